"""The page in a real browser: what people do there, and whether all people can.

`make browser-test` installs Playwright and axe and leaves screenshots; the browser is the machine's
own Chromium or Chrome.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from web_folder import HOSTILE, fill, served

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api", reason="without Playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: {', '.join(NAMES)}")
PATIENT = 300_000  # milliseconds, for machines that are slow
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    folder = fill(tmp_path_factory.mktemp("outer") / "files")
    with served(checkpoint, folder) as (host, port):
        yield f"http://{host}:{port}/", folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # as root, which CI is, its sandbox does not start
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = started.chromium.launch(executable_path=BROWSER, args=options)
        yield opened
        opened.close()


@contextmanager
def opened(browser, address, **options):
    """A page; an error on its console, a dialog or a request to elsewhere fails the test."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(PATIENT)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.accept()))
    root = address[: address.index("/", 8) + 1]
    page.on(
        "request",
        lambda request: request.url.startswith((root, "blob:")) or wrong.append(request.url),
    )
    page.goto(address)
    page.wait_for_selector(".hit")
    page.wait_for_load_state("networkidle")
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def screenshot(tmp_path, request):
    """Saves what a page shows, in SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def save(page, name):
        page.screenshot(path=folder / f"{name}.png")

    return save


def search(page, words):
    page.fill("#words", words)
    page.press("#words", "Enter")
    page.wait_for_selector(f"#heading:has-text('{words}')")
    page.wait_for_load_state("networkidle")


def names(page):
    return page.locator(".hit .name").all_inner_texts()


def scores(page):
    return [float(score) for score in page.locator(".hit .score").all_inner_texts()]


def focused(page):
    return page.locator(":focus")


def test_a_search_and_a_look_at_a_hit(browser, place, screenshot):
    with opened(browser, place[0]) as page:
        assert page.inner_text("#about").startswith("35 items, searched by ")
        assert page.inner_text("h1") == "files" and page.locator(".hit").count() == 24
        screenshot(page, "first")
        search(page, "a red picture")
        assert scores(page) == sorted(scores(page), reverse=True) and len(scores(page)) == 24
        screenshot(page, "search")
        second = names(page)[1]
        page.click(".hit >> nth=1")
        assert page.inner_text("#view-name") == second
        page.wait_for_load_state("networkidle")
        screenshot(page, "hit")
        page.click("#close")
        assert not page.is_visible("#view")
        page.click("#more")
        page.wait_for_selector(".hit >> nth=34")
        assert len(set(names(page))) == 35


def test_the_address_is_the_search(browser, place):
    with opened(browser, f"{place[0]}?q=words&kind=page") as page:
        assert set(names(page)) == {"report.pdf, page 1", "report.pdf, page 2"}
        assert page.input_value("#words") == "words" and page.is_checked("input[value=page]")
        page.check("input[value=video]")
        page.wait_for_selector(".hit:has-text('film.mp4')")
        assert names(page) == ["film.mp4"] and not page.is_visible("#more")
        page.go_back()
        page.wait_for_selector(".hit:has-text('report.pdf')")
        assert page.is_checked("input[value=page]")


def test_more_like_a_hit(browser, place):
    with opened(browser, place[0]) as page:
        search(page, "a green picture")
        first = names(page)[0]
        page.click(".hit >> nth=0")
        page.click("#near")
        page.wait_for_selector(f"#heading:has-text('nearest to {first}')")
        assert not page.is_visible("#view") and first not in names(page)
        playwright.expect(focused(page).locator(".name")).to_have_text(names(page)[0])


def test_what_was_typed_and_chosen_is_kept(browser, place):
    """A picture by going back, words that were not searched by yet by a change of the kind."""
    address, folder = place
    with opened(browser, address) as page:
        page.set_input_files("#picture", folder / "blue5.png")
        page.wait_for_selector("#heading:has-text('nearest to the picture')")
        page.fill("#words", "a blue one")
        page.check("input[value=picture]")
        both = "#heading:has-text('nearest to the picture and “a blue one”')"
        page.wait_for_selector(both)
        page.click(".hit >> nth=0")
        page.click("#near")
        page.wait_for_selector("#heading:text-matches('nearest to blue')")
        assert not page.is_visible("#asked") and page.input_value("#words") == ""
        assert page.is_checked("input[value=picture]")
        page.go_back()
        page.wait_for_selector(both)
        assert page.inner_text("#asked-name") == "blue5.png"
        assert page.input_value("#words") == "a blue one"
        page.reload()
        page.wait_for_selector("#status:has-text('choose it again')")
        search(page, "a green one")
        assert "choose it again" not in page.inner_text("#status")


def test_the_last_question_is_answered(browser, place):
    """However many came before it was; and a look at a hit goes on among the hits it was of."""
    with opened(browser, place[0]) as page:
        held = []
        page.route(lambda url: "=slow" in url, lambda route: held.append(route))
        page.fill("#words", "slow")
        page.press("#words", "Enter")
        page.wait_for_selector("#hits[aria-busy]")
        playwright.expect(page.locator("#status")).to_have_text("Searching …")
        before = names(page)
        page.click(".hit >> nth=0")
        with page.expect_response(lambda response: "=slow" in response.url):
            held[0].continue_()
        page.wait_for_selector("#heading:has-text('slow')", state="attached")
        page.click("#next")
        assert page.inner_text("#view-name") == before[1]
        page.click("#close")
        for words in ("slow 1", "slow 2", "fast"):
            page.fill("#words", words)
            page.press("#words", "Enter")
        page.wait_for_selector("#heading:has-text('fast')")
        for route in held[1:]:
            route.abort()
        page.wait_for_load_state("networkidle")
        assert page.inner_text("#heading") == "The 24 nearest to “fast”"


def test_what_is_read_out(browser, place):
    with opened(browser, f"{place[0]}?q=words&kind=text") as page:
        for hit in page.locator(".hit").all():
            name, score = (hit.locator(each).inner_text() for each in (".name", ".score"))
            assert hit.get_attribute("aria-label") == f"{name}, text, score {score}"
            assert hit.get_attribute("aria-description").startswith(("a red", "some words"))


def test_a_long_query_leaves_room(browser, place):
    with opened(browser, place[0]) as page:
        page.fill("#words", "word " * 1600)
        page.press("#words", "Enter")
        page.wait_for_selector("#heading:has-text('…”')")
        assert len(page.inner_text("#heading")) < 120


def test_more_goes_on_at_what_is_new(browser, place):
    with opened(browser, place[0]) as page:
        page.click("#more")
        page.wait_for_selector(".hit >> nth=34")
        playwright.expect(focused(page).locator(".name")).to_have_text(names(page)[24])


def test_a_server_that_is_gone_is_said(browser, place):
    context = browser.new_context()
    context.set_default_timeout(PATIENT)
    page = context.new_page()
    page.goto(place[0])
    page.click("#more")
    page.wait_for_selector(".hit >> nth=34")
    context.set_offline(True)
    page.click(".hit:has-text('words.txt')")
    page.wait_for_selector("pre:has-text('The server does not answer')")
    page.keyboard.press("Escape")
    page.fill("#words", "red")
    page.press("#words", "Enter")
    page.wait_for_selector("#status:has-text('The server does not answer')")
    context.close()


def test_a_picture_is_searched_by(browser, place, screenshot):
    address, folder = place
    with opened(browser, address) as page:
        page.set_input_files("#picture", folder / "blue5.png")
        page.wait_for_selector("#heading:has-text('nearest to the picture')")
        assert names(page)[0] == "blue5.png" and scores(page)[0] == pytest.approx(1, abs=2e-3)
        assert page.is_visible("#asked-picture")
        screenshot(page, "picture")
        page.click("#forget")
        page.wait_for_selector("#heading:has-text('What is here')")
        assert not page.is_visible("#asked")


def test_by_the_keyboard_alone(browser, place):
    with opened(browser, place[0]) as page:
        page.keyboard.press("/")
        page.keyboard.type("a blue picture")
        page.keyboard.press("Enter")
        page.wait_for_selector("#heading:has-text('a blue picture')")
        for _ in range(10):
            page.keyboard.press("Tab")
            if "hit" in (focused(page).get_attribute("class") or ""):
                break
        playwright.expect(focused(page).locator(".name")).to_have_text(names(page)[0])
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        columns = len({box["x"] for box in map(box_of, page.locator(".hit").all())})
        assert columns > 3
        assert focused(page).locator(".name").inner_text() == names(page)[1 + columns]
        page.keyboard.press("Enter")
        assert page.inner_text("#view-name") == names(page)[1 + columns]
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#view-name") == names(page)[2 + columns]
        page.keyboard.press("Escape")
        assert not page.is_visible("#view")
        # by an event that comes after the dialog is gone
        playwright.expect(focused(page).locator(".name")).to_have_text(names(page)[2 + columns])


def box_of(locator):
    return locator.bounding_box()


def test_every_kind_is_shown(browser, place, screenshot):
    with opened(browser, f"{place[0]}?kind=video") as page:
        page.click(".hit")
        assert page.get_attribute("#view-content video", "aria-label") == "film.mp4"
        page.wait_for_load_state("networkidle")
        screenshot(page, "video")
    with opened(browser, f"{place[0]}?kind=text") as page:
        page.click(".hit:has-text('script.html')")
        page.wait_for_selector("#view-content pre:has-text('some words')")
        assert page.inner_text("#view-content pre").strip() == "some words"
    with opened(browser, f"{place[0]}?kind=page") as page:
        page.click(".hit >> nth=1")
        assert page.get_attribute("#open", "href").endswith("#page=2")
        page.wait_for_selector("#view-content img")


def test_a_hostile_name_is_a_name(browser, place):
    """Escaped where it is shown, and where it is part of an address."""
    address, folder = place
    with opened(browser, f"{address}?q=%3Cimg src=x onerror=alert(1)%3E&kind=picture") as page:
        page.set_input_files("#picture", folder / HOSTILE)
        page.wait_for_selector("#heading:has-text('the picture')")
        page.click(f".hit >> nth={names(page).index(HOSTILE)}")
        assert page.inner_text("#view-name") == HOSTILE
        page.click("#near")
        page.wait_for_selector("#heading:has-text('onerror=alert(1)')")


def test_what_goes_wrong_is_said(browser, place):
    """The console tells of answers that are errors, too."""
    context = browser.new_context()
    context.set_default_timeout(PATIENT)
    page = context.new_page()
    page.goto(f"{place[0]}?near=nothing")
    page.wait_for_selector("#status:has-text('the index has no such item')")
    page.goto(f"{place[0]}?kind=sound")
    page.wait_for_selector("#status:has-text('Input should be')")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_all_people_can_use_it(browser, place, screenshot, viewport, scheme):
    """By axe's rules; and nothing is wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="without axe").Axe()
    # axe is a script that the page's own rules would keep out
    options = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
    with opened(browser, f"{place[0]}?q=a red picture", **options) as page:
        name = f"{'phone' if viewport is PHONE else 'desktop'}-{scheme}"
        for step in ("search", "hit"):
            if step == "hit":
                page.click(".hit >> nth=0")
                page.wait_for_load_state("networkidle")
            screenshot(page, f"{name}-{step}")
            found = axe.run(page).response
            assert len(found["passes"]) > 15
            said = [
                f"{v['id']} ({v['impact']}): {v['nodes'][0]['html']}" for v in found["violations"]
            ]
            assert said == []
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"]
