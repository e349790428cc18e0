"""The page in a real browser: Chromium, driven through its own driver; skipped where absent."""

import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longctx.bench.haystack import document
from longctx.embedded import model_path
from tests.api.live_server import LiveServer
from tests.support.made_documents import pdf
from tests.support.waiting import patient

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"
)
QUESTION = "What is the gate number of the crane in Belgrade?"
FACT = "The gate number of the crane in Belgrade is 5964."
NOTE = "The access code of the north gate is 7421.\n"
PAGE_OF_FACT = 212


class Page:
    """What somebody sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, server: LiveServer) -> None:
        self.driver.get(f"{server.url}/")

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)  # type: ignore[no-any-return]

    def one(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def until(self, condition: Any) -> Any:
        """Waits until something is so; elements may be replaced meanwhile."""
        wait = WebDriverWait(
            self.driver, patient(), 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return wait.until(lambda _: condition())

    def until_text(self, css: str, text: str) -> None:
        self.until(lambda: any(text in element.text for element in self.all(css)))

    def until_ready(self) -> None:
        self.until(lambda: self.one("#health").text == "ready")

    def upload(self, *paths: Path) -> None:
        self.one("#file-input").send_keys("\n".join(map(str, paths)))

    def row(self, name: str) -> Any:
        (row,) = (row for row in self.all("#document-list > li") if name in row.text)
        return row

    def until_state(self, name: str, state: str) -> Any:
        self.until(
            lambda: [
                row
                for row in self.all(f"#document-list > li[data-state={state}]")
                if name in row.text
            ]
        )
        return self.row(name)

    def ask(self, question: str) -> Any:
        """Types a question, presses Enter, and returns what stands there in the end."""
        before = len(self.all(".turn"))
        self.one("#question").send_keys(question, Keys.ENTER)
        self.until(lambda: len(self.all(".turn[aria-busy=false]")) == before + 1)
        return self.all(".turn")[-1]

    def figures(self, turn: Any) -> dict[str, str]:
        """What stands beside an answer: label -> figure."""
        return {
            each.find_element(By.TAG_NAME, "dt").text: each.find_element(By.TAG_NAME, "dd").text
            for each in turn.find_elements(By.CSS_SELECTOR, ".cost dl div")
        }

    def emulate(self, command: str, **parameters: Any) -> None:
        self.driver.execute_cdp_cmd(f"Emulation.{command}", parameters)

    def faults(self) -> list[str]:
        """What the browser has refused, or what has failed in the page, since the last call."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if "Failed to load resource" not in entry["message"]
        ]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(DRIVER))
    started.set_script_timeout(patient())
    yield started
    started.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    driver.get("about:blank")
    shown = Page(driver)
    shown.emulate(
        "setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False
    )
    shown.emulate("setEmulatedMedia", features=[])
    shown.faults()
    yield shown
    assert shown.faults() == []


def needle_server(folder: Path, **settings: Any) -> LiveServer:
    cache = {"kv_dir": folder / "kv", "disk_cap_gib": 0.5, "disk_free_gib": 0.0}
    return LiveServer(model_path(), folder / "store", cache=cache, **settings)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with needle_server(tmp_path_factory.mktemp("page")) as started:
        yield started


@pytest.fixture
def server(running: LiveServer) -> Iterator[LiveServer]:
    """One server for all tests, without documents at the beginning of each."""
    yield running
    for file in running.http.get("/v1/files").json()["data"]:
        running.http.delete(f"/v1/files/{file['id']}").raise_for_status()


@pytest.fixture
def note(tmp_path: Path) -> Path:
    path = tmp_path / "note.txt"
    path.write_text(NOTE * 40)
    return path


def handbook(path: Path, server: LiveServer) -> Path:
    """A PDF of 300 pages, with a fact at the head of one."""
    encode = server.tokenizer.encode
    text = document(9000, seed=3, count_tokens=lambda text: len(encode(text)))
    lines = textwrap.wrap(text, 80)
    size = len(lines) // 300
    pages = ["\n".join(lines[size * page : size * (page + 1)]) for page in range(300)]
    pages[PAGE_OF_FACT - 1] = f"{FACT}\n{pages[PAGE_OF_FACT - 1]}"
    path.write_bytes(pdf(*pages))
    return path


def test_a_pdf_of_300_pages_is_uploaded_and_the_answer_names_its_page(
    page: Page, server: LiveServer, tmp_path: Path
) -> None:
    page.open(server)
    page.until_ready()
    page.upload(handbook(tmp_path / "handbook.pdf", server))
    row = page.until_state("handbook.pdf", "ready")
    assert "300 pages" in row.text and "tokens" in row.text and "on the device" in row.text
    turn = page.ask(QUESTION)
    assert turn.find_element(By.CSS_SELECTOR, ".answer").text == "5964"
    page.until_text(".places", f"page {PAGE_OF_FACT} of handbook.pdf")
    (place,) = turn.find_elements(By.CSS_SELECTOR, ".places figure")
    assert FACT in place.text
    figures = page.figures(turn)
    assert int(figures["tokens computed"].replace(",", "")) < 200
    assert int(figures["found on the device"].replace(",", "")) > 9000
    assert "to the first token" in figures


def test_two_documents_in_one_question(page: Page, server: LiveServer, note: Path) -> None:
    other = note.with_name("other.txt")
    other.write_text(f"{FACT}\n" * 20)
    page.open(server)
    page.until_ready()
    page.upload(note, other)
    for name in ("note.txt", "other.txt"):
        page.until_state(name, "ready")
    assert "note.txt" in page.one("#chosen").text and "other.txt" in page.one("#chosen").text
    turn = page.ask(QUESTION)
    assert turn.find_element(By.CSS_SELECTOR, ".answer").text == "5964"
    assert "other.txt" in turn.find_element(By.CSS_SELECTOR, ".question").text
    turn = page.ask("What is the access code of the north gate?")
    assert turn.find_element(By.CSS_SELECTOR, ".answer").text == "7421"


def test_a_file_is_dropped_anywhere_and_a_follow_up_goes_on_with_the_answers_above(
    page: Page, server: LiveServer
) -> None:
    page.open(server)
    page.until_ready()
    page.driver.execute_script(
        "const carried = new DataTransfer();"
        "carried.items.add(new File([arguments[0]], 'dropped.txt'));"
        "for (const type of ['dragenter', 'dragover', 'drop']) document.body.dispatchEvent("
        " new DragEvent(type, {dataTransfer: carried, bubbles: true, cancelable: true}));",
        NOTE + FACT,
    )
    page.until_state("dropped.txt", "ready")
    assert not page.all("#drop.over")
    page.ask("What is the access code of the north gate?")
    page.driver.execute_script(
        "const sent = window.fetch; window.asked = []; window.fetch = (path, ...more) => {"
        " if (path.includes('chat')) window.asked.push(JSON.parse(more[0].body).messages);"
        " return sent(path, ...more); };"
    )
    page.one("#follow-up").click()
    page.ask(QUESTION)
    ((first, answer, second),) = page.driver.execute_script("return window.asked")
    assert [part["type"] for part in first["content"]] == ["file", "text"]
    assert answer == {"role": "assistant", "content": "7421"}
    assert second["content"] == [{"type": "text", "text": QUESTION}]  # the file stands above


def test_a_file_that_fails_says_why_where_it_stands(
    page: Page, server: LiveServer, tmp_path: Path
) -> None:
    (tmp_path / "scan.pdf").write_bytes(pdf("", ""))
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    page.open(server)
    page.until_ready()
    page.upload(tmp_path / "scan.pdf", tmp_path / "binary.txt")
    row = page.until_state("scan.pdf", "error")
    assert "only pictures" in row.text
    box = row.find_element(By.TAG_NAME, "input")
    assert not box.is_enabled() and not box.is_selected()
    row = page.until_state("binary.txt", "error")
    assert "the file is binary" in row.text
    row.find_element(By.TAG_NAME, "button").click()  # Dismiss
    page.until(lambda: "binary.txt" not in page.one("#document-list").text)
    erase = page.row("scan.pdf").find_element(By.TAG_NAME, "button")
    erase.click()
    assert erase.text == "Really?" and "scan.pdf" in page.one("#document-list").text
    erase.click()
    page.until(lambda: "scan.pdf" not in page.one("#document-list").text)
    assert "scan.pdf is deleted" in page.one("#document-note").text


def test_a_question_that_is_refused_says_so_and_can_be_asked_again(
    page: Page, server: LiveServer
) -> None:
    page.open(server)
    page.until_ready()
    page.one("#send").click()
    assert "Write a question" in page.one("#ask-fault").text
    page.driver.execute_script(
        "const sent = window.fetch; window.fetch = (path, ...more) => path.includes('chat') ? "
        "Promise.resolve(Response.json({error: {message: 'too many ask'}}, {status: 429})) : "
        "sent(path, ...more);"
    )
    turn = page.ask("Who?")
    assert "too many ask" in turn.find_element(By.CSS_SELECTOR, ".fault").text
    assert page.one("#question").get_property("value") == "Who?"


def test_an_answer_can_be_stopped(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.until_ready()
    page.driver.execute_script(
        "const sent = window.fetch; window.fetch = (path, options) => {"
        " if (!path.includes('chat')) return sent(path, options);"
        " const event = JSON.stringify({choices: [{delta: {content: 'on and'}}]});"
        " const body = new ReadableStream({start(to) {"
        "  to.enqueue(new TextEncoder().encode(`data: ${event}\\n\\n`));"
        "  options.signal.addEventListener('abort', () => to.error(options.signal.reason)); }});"
        " return Promise.resolve(new Response(body)); };"
    )
    page.one("#question").send_keys("What?", Keys.ENTER)
    page.until_text(".answer", "on and")
    assert not page.one("#send").is_enabled()
    page.one("#stop").click()
    page.until(lambda: page.all(".turn[aria-busy=false]"))
    page.until_text(".turn .wait", "Stopped.")
    page.until_text(".answer", "on and")
    assert page.one("#send").is_enabled() and not page.one("#stop").is_displayed()


def test_a_prompt_is_stored_by_name_used_and_deleted(
    page: Page, server: LiveServer, note: Path
) -> None:
    page.open(server)
    page.until_ready()
    page.one("#new-prompt summary").click()
    page.one("#prompt-name").send_keys("not a name")
    page.one("#prompt-system").send_keys(NOTE * 4)
    page.one("#prompt-form button").click()
    page.until_text("#prompt-fault", "must have 1 to 64 letters")
    page.one("#prompt-name").clear()
    page.one("#prompt-name").send_keys("gates", Keys.ENTER)
    page.until_text("#prompt-list", "gates")
    page.until(lambda: page.one("#begin").get_property("value") == "gates")
    for box in page.all("#document-list input:checked"):
        box.click()
    turn = page.ask("What is the access code of the north gate?")
    assert turn.find_element(By.CSS_SELECTOR, ".answer").text == "7421"
    page.until_text("#prompt-list", "used once")
    for _ in range(2):
        page.one("#prompt-list button:last-child").click()
    page.until(lambda: not page.all("#prompt-list li"))
    assert page.one("#begin").get_property("value") == ""


def test_the_cache_is_drawn_and_needles_where_they_were_measured(
    page: Page, server: LiveServer, note: Path
) -> None:
    page.open(server)
    page.until_ready()
    assert not page.one("#needles").is_displayed()
    page.until_text("#tiers", "room for")
    assert [each.text for each in page.all("#tiers .name")] == ["Device", "Disk"]
    assert page.all(".vessel.device[aria-label*=full]")
    results = [
        {
            "metric": "exact match",
            "value": share,
            "n": 8,
            "model": "needle",
            "kv_codec": "int8",
            "kind": "any",
            "length_tokens": 4096,
            "depth_percent": depth,
        }
        for depth, share in ((0.0, 1.0), (50.0, 0.25))
    ]
    folder = server.config.folder / "bench"
    folder.mkdir()
    (folder / "niah.json").write_text(json.dumps({"bench": "niah", "results": results}))
    page.open(server)
    page.until(lambda: page.one("#needles").is_displayed())
    assert [each.text for each in page.all("#heat td")] == ["100", "25"]
    assert "4k" in page.one("#heat").text


def test_a_restart_is_told_and_the_next_question_reads_from_disk(
    page: Page, tmp_path: Path, note: Path
) -> None:
    with needle_server(tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
        page.open(first)
        page.until_ready()
        page.upload(note)
        page.until_state("note.txt", "ready")
        page.ask("What is the access code of the north gate?")
    page.driver.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
    page.until_text("#health", "does not answer")
    with needle_server(tmp_path, port=port):
        page.until_ready()
        assert page.row("note.txt").find_element(By.TAG_NAME, "input").is_selected()
        page.until_state("note.txt", "ready")
        turn = page.ask("What is the access code of the north gate?")
        assert turn.find_element(By.CSS_SELECTOR, ".answer").text == "7421"
        figures = page.figures(turn)
        assert int(figures["found on disk"].replace(",", "")) > 300
        assert int(figures["tokens computed"].replace(",", "")) < 200


def test_a_wrong_key_is_asked_for_again_and_the_right_one_is_kept_for_the_tab(
    page: Page, tmp_path: Path, model_folder: Path
) -> None:
    with LiveServer(model_folder, tmp_path, api_key=("right-key",)) as locked:
        page.open(locked)
        page.until(lambda: page.one("#key-dialog").is_displayed())
        page.one("#key-input").send_keys("wrong-key", Keys.ENTER)
        page.until_text("#key-fault", "does not accept")
        page.one("#key-input").send_keys("right-key", Keys.ENTER)
        page.until_ready()
        assert not page.one("#key-dialog").is_displayed()
        page.driver.refresh()
        page.until_ready()
        assert not page.one("#key-dialog").is_displayed()
        page.driver.execute_script("sessionStorage.clear()")
        page.driver.refresh()
        page.until(lambda: page.one("#key-dialog").is_displayed())
        page.one("#key-cancel").click()
        page.until_text("#document-fault", "valid API key")
        page.one("#key-button").click()
        page.one("#key-input").send_keys("right-key", Keys.ENTER)
        page.until_ready()
        assert not page.one("#document-fault").is_displayed()


def test_it_fits_a_phone_and_follows_the_system_into_the_dark(
    page: Page, server: LiveServer, note: Path
) -> None:
    page.open(server)
    page.until_ready()
    page.upload(note.rename(note.with_name(f"a-long-name-{'x' * 60}.txt")))
    page.until_state("a-long-name", "ready")
    page.ask("What is the access code of the north gate?")

    def look(scheme: str, width: int) -> tuple[str, int]:
        page.emulate(
            "setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=True
        )
        scheme_ = {"name": "prefers-color-scheme", "value": scheme}
        page.emulate("setEmulatedMedia", features=[scheme_])
        return tuple(  # type: ignore[return-value]
            page.driver.execute_script(
                "return [getComputedStyle(document.body).backgroundColor,"
                " document.documentElement.scrollWidth]"
            )
        )

    (light, width), (dark, _) = look("light", 390), look("dark", 390)
    assert light != dark
    assert width == 390
    assert look("light", 320)[1] == 320


def test_everything_is_reached_by_keyboard(page: Page, server: LiveServer, note: Path) -> None:
    page.open(server)
    page.until_ready()
    page.upload(note)
    page.until_state("note.txt", "ready")
    reached = set()
    page.driver.execute_script("document.activeElement.blur()")
    keyboard = webdriver.ActionChains(page.driver)
    for _ in range(60):
        keyboard.send_keys(Keys.TAB).perform()
        element = page.driver.switch_to.active_element
        reached.add(element.get_attribute("id") or element.get_attribute("aria-label"))
    assert reached >= {"file-input", "question", "begin", "follow-up", "send", "Delete note.txt"}


def test_the_policy_keeps_the_browser_from_what_is_not_the_servers(
    page: Page, server: LiveServer
) -> None:
    page.open(server)
    page.until_ready()
    refused = page.driver.execute_script(
        "const script = document.createElement('script');"
        "try { script.textContent = 'window.broken = true'; document.body.append(script); }"
        "catch (refused) { return refused.name; }"
    )
    assert refused == "TypeError" and page.driver.execute_script("return window.broken") is None
    directive = page.driver.execute_async_script(
        "const done = arguments[0];"
        "addEventListener('securitypolicyviolation', (told) => done(told.effectiveDirective));"
        "new Image().src = 'http://127.0.0.1:9/picture.png';"
    )
    assert directive == "img-src"
    assert len(page.faults()) == 2  # the browser has said so


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param("5964.", ["page 2"], id="all of it"),
        pytest.param("596", [], id="no part of a number"),
        pytest.param("the\ngolden   GATE", ["page 1"], id="other white space and case"),
        pytest.param("It says a lot. The code of the gate is 5964.", ["page 2"], id="a sentence"),
        pytest.param("That would be 5964, I think, or so it seems", ["page 2"], id="a value"),
        pytest.param("x+(y", ["page 3"], id="signs of expressions"),
        pytest.param("", [], id="nothing"),
    ],
)
def test_an_answer_is_found_in_the_section_where_it_stands(
    page: Page, server: LiveServer, answer: str, expected: list[str]
) -> None:
    parts = [
        "[page 1]\n😀😀😀 The golden gate.\n\n",
        "[page 2]\nThe code of the gate is 5964.\n\n",
        "[page 3]\nx+(y\n",
    ]
    sections = [
        {"offset": sum(map(len, parts[:index])), "label": f"page {index + 1}"}
        for index in range(len(parts))
    ]
    page.open(server)
    page.until_ready()
    found = page.driver.execute_async_script(
        "const [text, sections, answer, done] = arguments;"
        "import('/page/sources.js').then(({placesIn}) => done(placesIn(text, sections, answer)));",
        "".join(parts),
        sections,
        answer,
    )
    assert [place["label"] for place in found["places"]] == expected
    assert not any("[" in part for p in found["places"] for part in p["excerpt"].values())
