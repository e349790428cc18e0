"""Holds what the gate reads: prose, code, a conversation and clauses that refer to each other.

Each text is read as a document and is asked two questions; words, numbers and names come back in
it, so that a model which copies from far back has something to copy.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text that is read as a document with this title, and what is asked about it."""

    title: str
    body: str
    questions: tuple[str, ...]


_PROSE = """\
The lighthouse at Corran Head was built in 1871 after three ships were lost on the same reef in a
single winter. It stands on a shelf of grey slate, forty metres above the water, and its lamp could
be seen for nineteen miles on a clear night. The first keeper, Agnes Mullory, kept a diary for
twenty-six years. She wrote down the weather every morning, the ships she had counted, and the
price of lamp oil, which rose from nine pence a gallon to fourteen while she lived there.

In the spring of 1884 a storm broke the lantern glass. The spare panes were stored in the village,
two hours away by the coast path, and the path was under water. Agnes covered the broken side with
a sail, tied it down with rope from her own boat, and turned the lamp by hand until morning. No
ship was lost that night. The harbour board sent her a letter of thanks and a bill for the sail.

Her diary was found in 1952, when the lamp was changed from oil to electricity. The workmen lifted
a floor board to lay a cable, and below it lay a tin box with eleven notebooks. The paper was dry
and the ink had hardly faded. Most entries are short. "Wind from the south-west, strong. Counted
seven ships. Oil is fourteen pence." Others are longer, and a few are about people: the
schoolmaster who came each month to borrow a book, the fisherman who could not swim, and the
inspector from the harbour board, who never climbed the stairs.

Today the lighthouse at Corran Head belongs to a small trust. Visitors may climb the stairs on
Sundays between ten and four, and on a clear day they can see the reef, a dark line in the water to
the north. The lamp still turns every evening. It is controlled by a computer in a town eighty
miles away, and nobody has slept in the keeper's room since 1988. The tin box and the eleven
notebooks are kept in the museum of the village, next to a piece of rope and an old sail. The trust
has asked for money to repair the slate shelf, which loses about two centimetres each winter, and
it expects to begin in the year after next, if the harbour board agrees.
"""

_CODE = '''\
"""A ledger that keeps accounts in whole cents and never loses a transfer."""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date


class LedgerError(Exception):
    """The ledger refused a change; nothing was written."""


@dataclass(frozen=True)
class Transfer:
    day: date
    source: str
    target: str
    cents: int
    note: str = ""

    def reversed(self) -> "Transfer":
        return Transfer(self.day, self.target, self.source, self.cents, f"reversal: {self.note}")


@dataclass
class Ledger:
    limit_cents: int = 500_000
    transfers: list[Transfer] = field(default_factory=list)
    balances: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, transfer: Transfer) -> None:
        """Raises LedgerError where the transfer is empty, too large or leaves less than nothing."""
        if transfer.cents <= 0:
            raise LedgerError(f"a transfer of {transfer.cents} cents moves nothing")
        if transfer.cents > self.limit_cents:
            raise LedgerError(f"{transfer.cents} cents are more than the limit {self.limit_cents}")
        if transfer.source != "bank" and self.balances[transfer.source] < transfer.cents:
            raise LedgerError(f"{transfer.source} has only {self.balances[transfer.source]} cents")
        self.transfers.append(transfer)
        self.balances[transfer.source] -= transfer.cents
        self.balances[transfer.target] += transfer.cents

    def undo(self) -> Transfer:
        """Take the last transfer back by adding its reversal."""
        if not self.transfers:
            raise LedgerError("there is no transfer to undo")
        last = self.transfers[-1].reversed()
        self.add(last)
        return last

    def statement(self, account: str) -> list[str]:
        lines = []
        total = 0
        for transfer in self.transfers:
            if transfer.source == account:
                total -= transfer.cents
            elif transfer.target == account:
                total += transfer.cents
            else:
                continue
            lines.append(f"{transfer.day} {transfer.note:<20} {total / 100:>10.2f}")
        return lines


def test_a_transfer_moves_money() -> None:
    ledger = Ledger()
    ledger.add(Transfer(date(2024, 3, 1), "bank", "rent", 90_000, "March"))
    assert ledger.balances["rent"] == 90_000
    assert ledger.balances["bank"] == -90_000


def test_nothing_is_moved_beyond_the_limit() -> None:
    ledger = Ledger(limit_cents=1_000)
    try:
        ledger.add(Transfer(date(2024, 3, 2), "bank", "food", 1_001))
    except LedgerError as error:
        assert str(error) == "1001 cents are more than the limit 1000"
    assert ledger.transfers == []
'''

_TALK = """\
Minutes of the garden committee, Thursday 14 September

Present: Ruth Adeyemi (chair), Tomas Lindqvist, Farah Haddad, Piet de Vries. Absent: Nora Quill.

1. Water
Tomas: The pump by the east gate gave 310 litres an hour in June and only 190 last week. I cleaned
the filter twice. I think the well is low, not the pump weak.
Ruth: Could we measure the well before we buy anything?
Tomas: Yes. I need a line of twelve metres and a weight. Farah has one.
Farah: You can have it on Saturday. The west pump is fine, by the way. It gave 305 litres.
Decision: Tomas measures the well on Saturday 16 September with Farah's line. No pump is bought
before that.

2. Plots
Piet: Four people have left since spring: plots 7, 12, 19 and 33 are free. Eleven names are on the
waiting list. The first four are Amsel, Okafor, Brandt and Yilmaz.
Ruth: Plot 19 floods when it rains. Whoever takes it should know that.
Piet: I will tell them. If the first one does not want it, I ask the next on the list.
Decision: Piet writes to Amsel, Okafor, Brandt and Yilmaz. Plot 19 is offered with half the fee,
which is 24 instead of 48 a year.

3. Tools
| tool         | number | state        |
| spade        | 9      | good         |
| fork         | 6      | two broken   |
| wheelbarrow  | 3      | one flat     |
| hose, 25 m   | 4      | good         |
| ladder       | 1      | missing      |
Farah: The ladder was there in August. I asked everyone on the north side.
Piet: I borrowed it for the pear tree. It is behind plot 33. I am sorry.
Decision: Piet brings the ladder back. Farah has two forks mended, for at most 30.

4. Harvest supper
Ruth: Last year 46 people came and the soup was gone by eight. I would plan for 60.
Tomas: Then we need the big pot from the school, and two more tables.
Farah: I ask the school. Who brings bread?
Piet: I bring bread for 60.
Decision: The supper is on Saturday 7 October at six. Farah asks the school for the pot and the
tables, Piet brings bread for 60, Ruth writes the invitation.

Next meeting: Thursday 12 October, at Ruth's house.
"""

_CLAUSES = """\
Rules for the loan of measuring instruments

Section 1. Words. In these rules "the store" is the instrument store of the institute, "the
borrower" is the person who signs the slip, and "an instrument" is anything that has a number of
the store on it. A day is a working day.

Section 2. Loan. The borrower signs a slip for each instrument. The slip has the number of the
instrument, the name of the borrower, the day of the loan and the day of return. The store keeps
the white copy and the borrower keeps the yellow copy. An instrument of class A is lent for ten
days, an instrument of class B for five days, and an instrument of class C only in the presence of
a technician of the store.

Section 3. Return. The borrower returns the instrument on the day of return, in its case, with
everything that was in the case. The store checks the instrument in the presence of the borrower
and signs the yellow copy. Until the yellow copy is signed, the borrower answers for the
instrument.

Section 4. Extension. The borrower may extend a loan of class A twice, by ten days each time, and a
loan of class B once, by five days, if nobody else has asked for the instrument. The borrower asks
before the day of return. A loan of class C is never extended.

Section 5. Damage. The borrower reports damage at once, by telephone and in writing. An instrument
that fell, that became wet or that was hotter than sixty degrees is not used again before the store
has checked it, even if it seems to work. Damage that was reported on the same day costs the
borrower nothing. Damage that the store finds by itself costs the borrower the repair, but at most
400.

Section 6. Delay. For each day after the day of return the borrower pays 5 for an instrument of
class A and 10 for an instrument of class B. After twenty days the store sends a last letter; five
days after the letter it treats the instrument as lost. For a lost instrument the borrower pays
what a new one costs, less a tenth for each year that the store has had it.

Section 7. Refusal. The store may refuse a loan to a borrower who has paid under section 5 or
section 6 within the last year. The borrower may ask the head of the institute to decide. Until the
head of the institute has decided, the refusal holds.
"""

TEXTS = (
    Text(
        title="Corran Head",
        body=_PROSE,
        questions=(
            "Who kept the diary, and what did she write down every morning?",
            "Describe what happened in the storm of 1884.",
        ),
    ),
    Text(
        title="ledger.py",
        body=_CODE,
        questions=(
            "When does adding a transfer raise an error?",
            "Write a test for the method that takes a transfer back.",
        ),
    ),
    Text(
        title="Minutes",
        body=_TALK,
        questions=(
            "Which plots are free, and who is on the waiting list?",
            "List every decision with the person who has to act.",
        ),
    ),
    Text(
        title="Loan rules",
        body=_CLAUSES,
        questions=(
            "For how long is an instrument of each class lent?",
            "What does a borrower pay for an instrument that is lost?",
        ),
    ),
)
