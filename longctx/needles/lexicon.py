"""The words the generator builds keys, values and filler from.

Every word belongs to one half for good: `held_out(word)` is a hash of the word, so training never
sees a key that evaluation uses, whatever the seed, and nobody has to keep a list of the split.
"""

from hashlib import blake2b

HELD_OUT_SHARE = 4  # one word, number or phrase in four is kept for evaluation


def held_out(text: str) -> bool:
    """Whether `text` (a key word or a whole value) is reserved for evaluation."""
    return blake2b(text.lower().encode(), digest_size=1).digest()[0] % HELD_OUT_SHARE == 0


ADJECTIVES = tuple(
    """abandoned able abrasive absent ancient amber angry arctic autumn awake bald basic bent
bitter black bland blue bold brave brief bright brisk broad broken bronze brown busy calm
careful cheap chilly civil clean clever cloudy cold common cool copper coral crimson crisp
curious damp dark dear deep dense distant double dry dull dusty eager early earnest
eastern elder electric empty equal even fair faint famous fancy fast fierce final fine
firm first flat foreign formal fourth fragile free fresh frozen full gentle giant glad
golden good grand grave gray great green grim happy hard harsh hasty heavy hidden high
hollow honest hot huge humble hungry icy idle inner iron ivory jolly keen kind large last
late lazy lean left light little lively local lonely long loose loud lower loyal lucky
main marble mellow middle mild minor misty modern modest mossy muddy narrow nasty near
neat new nimble noble noisy northern novel oak odd old olive open orange outer pale
patient plain polite poor proud purple quaint quick quiet rapid rare raw red remote rich
right rigid ripe rough round royal rural rusty sacred sad safe salty scarlet second secret
senior serene shallow sharp shiny short silent silver simple sleepy slim slow small smart
smooth soft solar solid sour southern spare square stale stark steady steep stern still
stone strange strict strong sturdy sunny super sweet swift tall tame tender thick thin
third tidy tiny tired tough upper urban vague vast velvet violet vivid warm wary weak
western wet white wide wild windy winter wise wooden yellow young zealous""".split()
)

NOUNS = tuple(
    """account actor airport album alley anchor antenna apartment apple archive arena arrow atlas
attic author badge bakery balcony banner bank barn barrel basin basket battery beach
beacon bell bench bicycle boat boiler bottle boulder box branch breeze brick bridge brook
bucket building button cabin cabinet cable camera camp canal candle canyon captain car
card carpet castle cathedral cave cellar chain chair chapel chart chimney church circle
circuit citadel clinic clock cloud coach coast coin college colony column comet compass
concert contract convoy copy corner corridor cottage council counter courier court crane
crate crew crystal cup curtain dam deck delta depot desert desk device diary district dock
doctor document dome door draft drawer dream drill driver drum duck dune eagle editor
elevator embassy engine envelope estate exhibit factory falcon farm fence ferry festival
field file filter fireplace flag fleet flute folder forest forge fort fountain fox frame
freezer friend fridge gallery garage garden gate generator glacier glass globe goose grove
guard guest guitar hall hammer hangar harbor harvest hat hedge helmet hill hotel house hut
index inspector island jacket jar jetty journal judge jungle kettle key kitchen kite
knight lab ladder lagoon lake lamp lantern lawyer leaf ledger lens letter library lift
lighthouse lion locker lodge loft log lounge machine magazine manor map market mast meadow
mechanic medal menu mill mine mirror mission model monitor monument moon motor mountain
museum needle nest network notebook novelist nursery oasis observatory ocean office
orchard orchestra order oven owl package palace panel paper parcel park partner pasture
path patient pavilion pencil piano pier pilot pipeline planet plant plaza pocket poem pond
pool port portal poster press printer prison project pump purse quarry radio raft railway
ramp ranch reactor receipt record reef report reservoir ridge rifle river road robot
rocket roof room rope router safe sail sample school scooter sculptor seal sensor server
shed shelf shelter ship shop shore shuttle signal silo sister sketch slope socket spring
squad stable stadium staff stage stairs statue station storm stove street studio submarine
suitcase summit switch table tailor tank teacher telescope temple tenant tent terminal
terrace theater ticket tiger tool tower town tractor trail train tree trench truck trumpet
tunnel turbine turtle vault vessel village violin visitor volcano wagon wall warehouse
watch water wheel whistle window wing witness wolf workshop yacht yard zone""".split()
)

FIRST_NAMES = tuple(
    """Aaron Abigail Adam Agnes Ahmed Aisha Alan Alice Amara Ana Andrei Anita Anton Arthur Astrid
Beatrice Ben Boris Bruno Camila Carlos Carmen Cecilia Chen Clara Daniel Daria David Diego
Dmitri Dora Edith Elena Elias Emil Emma Erik Esther Fatima Felix Fiona Frank Gabriel Georg
Grace Greta Hannah Harold Hassan Helen Henry Hugo Ibrahim Ida Igor Ines Ingrid Irene Isaac
Ivan Jack Jakob James Jana Javier Jin Joan Johan Jonas Judith Julia Karim Karl Kate Kenji
Kira Lars Laura Lena Leo Lila Louis Lucia Luis Mara Marco Maria Martin Maya Mei Mila
Miriam Nadia Naomi Nina Noah Nora Olga Oliver Omar Oscar Paula Pavel Pedro Petra Priya
Quentin Rachel Ravi Rita Robert Rosa Ruth Samir Sara Simon Sofia Stefan Susan Sven Tara
Teresa Thomas Tomas Ursula Vera Victor Walter Wanda Xavier Yara Yusuf Zara Zoe""".split()
)

SURNAMES = tuple(
    """Abbott Adler Almeida Andersen Baker Barnes Becker Bell Bennett Berg Bianchi Bishop Blake
Brandt Brooks Carter Castro Chandra Clarke Cole Costa Cruz Dahl Dalton Davies Diaz Dixon
Doyle Duarte Eaton Eriksen Evans Farrell Ferreira Fischer Fleming Flores Foster Garcia
Gibson Gomez Grant Greene Gupta Haas Hahn Hansen Harper Hayes Henriksen Hoffman Holt
Hughes Ibarra Iyer Jansen Jensen Joshi Kaplan Keller Khan Kim Klein Kovacs Kumar Lang
Larsen Lindqvist Lopez Lund Marsh Mason Meyer Mills Molina Moore Morales Nakamura Nash
Navarro Newton Novak Olsen Ortega Osborne Park Patel Pereira Perry Petrov Pratt Quinn
Ramos Reyes Ricci Richter Rivera Rossi Ryan Santos Sato Schmidt Shah Silva Singh Sloan
Sokolov Stone Suzuki Tanaka Taylor Torres Turner Vargas Vega Vogel Wagner Walsh Weber Webb
Winter Wong Wood Yamada Young Zhang Zimmerman""".split()
)

PLACES = (
    *"""Aberdeen Accra Adelaide Algiers Amsterdam Ankara Antwerp Athens Auckland Austin Baltimore
Bangkok Barcelona Basel Belfast Belgrade Bergen Berlin Bilbao Bogota Bologna Boston Bremen
Bristol Brussels Bucharest Budapest Cairo Calgary Cardiff Chicago Cologne Copenhagen Cork
Dakar Dallas Delhi Denver Dresden Dublin Durban Edinburgh Florence Frankfurt Geneva Genoa
Glasgow Granada Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kyoto Lagos Leipzig
Lima Lisbon Liverpool London Lyon Madrid Malaga Manila Marseille Melbourne Miami Milan
Montreal Moscow Mumbai Munich Nairobi Naples Oslo Ottawa Oxford Palermo Paris Perth
Philadelphia Porto Prague Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Seattle
Seoul Seville Shanghai Singapore Sofia Stockholm Sydney Tallinn Tokyo Toronto Trieste
Tunis Turin Utrecht Valencia Vancouver Venice Vienna Warsaw Wellington York Zagreb
Zurich""".split(),
    "San Francisco",
    "New York",
    "Buenos Aires",
    "Cape Town",
    "Hong Kong",
    "Los Angeles",
    "Tel Aviv",
)

# What a person writes down about something, by the kind of value that answers it.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "number": tuple(
        """access code|account number|badge number|batch number|booking number|budget|capacity|
case number|catalogue number|contract number|door code|employee number|extension|
file number|flight number|gate number|invoice number|key code|licence number|
lock combination|locker number|magic number|membership number|meter reading|order number|
passcode|phone number|pin|population|postal code|price|reference number|registration number|
room number|score|seat number|secret number|security code|serial number|
special magic number|ticket number|total weight|tracking number|unit number|voucher number|
weight""".split("|")
    ),
    "word": tuple(
        """code name|code word|codename|colour|favourite word|keyword|magic word|nickname|
pass phrase|password|secret word|security word|special magic word|symbol|user name|watchword|
emblem|mascot""".split("|")
    ),
    "person": tuple(
        """architect|author|captain|caretaker|chairman|contact person|designer|director|doctor|
editor|founder|guard|inspector|manager|owner|project leader|supervisor|tenant|
treasurer|witness""".split("|")
    ),
    "place": tuple(
        """birthplace|destination|head office|home port|home town|location|meeting place|next stop|
origin|place of issue|storage site|venue""".split("|")
    ),
    "code": tuple(
        """access key|asset tag|batch code|identifier|licence plate|model number|part number|
product code|reference|registration|release tag|serial code|shelf mark|special magic uuid|
token|version""".split("|")
    ),
    "date": tuple(
        """closing date|date of birth|deadline|delivery date|departure time|due date|expiry date|
founding date|inspection date|launch date|opening date|opening time|release date|
review date|start date""".split("|")
    ),
}
ATTRIBUTES = {kind: tuple(map(str.strip, names)) for kind, names in ATTRIBUTES.items()}

ACTIVITIES = tuple(
    text.strip()
    for text in """eat a sandwich|sit in the park|walk along the river|visit the old market|
drink coffee by the harbour|watch the boats|climb the bell tower|listen to street music|
read a book under the trees|rent a bicycle|take the ferry at sunset|swim in the lake|
look at the stars|feed the ducks|buy fresh bread|ride the tram|sketch the cathedral|
taste the local cheese|fly a kite|play chess with strangers|see the glass museum|
pick oranges|follow the canal|have a picnic|dance until midnight|sleep in a tent|
row a small boat|count the bridges|hear the choir|try the noodle soup""".split("|")
)
ADVERBS = tuple(
    text.strip()
    for text in """on a sunny day|in the early morning|with an old friend|after the rain|
when the shops are closed|on the last day of May|before breakfast|with no money at all|
late in autumn|during the festival|at low tide|every Thursday|in complete silence|
while it snows|for an hour""".split("|")
)
VERBS = tuple(
    """admires approves avoids borrows brings builds buys calls carries checks cleans closes
collects counts covers crosses cuts describes designs draws enters examines explains fills
finds follows forgets guards helps hides holds ignores improves inspects keeps leaves
lends likes lists loses measures meets mentions moves needs notices offers opens orders
owns paints passes plans praises prefers prints protects pulls pushes reaches reads
records remembers repairs replaces reports returns saves sees sells sends shares shows
signs sorts starts stops stores studies supports takes teaches tests tries uses visits
wants washes watches weighs writes""".split()
)
