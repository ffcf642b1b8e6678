"""The page in headless Chromium, by mouse, by keyboard and on a phone; no console error in the whole story.

Most of it is in front of a stand-in (`page_service`) whose answers, and whose page's requests, are held against the
records of the real service; the last test drives the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import page_service
from tests.e2e.page_service import NASTY, PAGE, Refusal, Service

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
PHONE = {"width": 360, "height": 740}
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"  # > 0: it scrolls sideways
COUNTED = """window.moves = 0; const animate = Element.prototype.animate;
Element.prototype.animate = function (...given) { window.moves += 1; return animate.apply(this, given); }; null"""
VISIBLE = """getComputedStyle(document.activeElement).outlineStyle !== 'none' ||
Number.parseFloat(getComputedStyle(document.activeElement).strokeWidth) >= 2"""
SETTLED = "document.getAnimations().every(one => one.playState !== 'running')"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    server, url = page_service.start(service)
    yield url
    server.shutdown()
    server.server_close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open the page at an address; at the end there must be no error in its console, unless `expected` matches."""
    opened: list[tuple[Any, list[str], str]] = []

    def open_tab(address: str, expected: str = "", **options: Any) -> Any:
        context = chromium.new_context(viewport=options.pop("viewport", {"width": 1440, "height": 1000}), **options)
        page, errors = context.new_page(), []
        page.set_default_timeout(10_000)
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        opened.append((context, errors, expected))
        page.goto(address)
        return page

    yield open_tab
    found = []
    for context, errors, expected in opened:
        context.close()
        found += [error for error in errors if not (expected and re.search(expected, error))]
    assert found == []


def ids(page: Any, column: str) -> list[str]:
    return [row.get_attribute("data-id") for row in page.locator(f"#{column} .row").all()]


def look_at(page: Any, user: str) -> None:
    page.fill("#search", user)
    page.wait_for_selector("#found li")
    page.press("#search", "Enter")
    has(page, "#person-title", f"User {user}")
    until(page, "document.querySelector('#busy').hidden && document.querySelector('#right .row') !== null")


def until(page: Any, expression: str) -> None:
    """Wait until JavaScript says true; Playwright's own way evaluates text in the page, which the policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(30)


def has(page: Any, selector: str, text: str) -> None:
    """Wait until an element has a text."""
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=10_000)


def change(page: Any, label: str, value: str) -> str:
    """Set a context column; what the page says of it."""
    before = page.text_content("#moved")
    page.get_by_label(label, exact=True).fill(value)
    until(page, f"document.querySelector('#moved').textContent !== {json.dumps(before)}")
    return page.inner_text("#moved")


@needs_chromium
def test_the_whole_story(service, url, tab):
    page = tab(url)
    has(page, "#cards", "ranks and retrieves")
    assert page.inner_text("#cards").count("ranks") == 2
    page.fill("#search", "1")
    page.wait_for_selector("#found li")
    assert all(text.startswith("1") for text in page.locator("#found li").all_inner_texts())
    look_at(page, "13")
    assert page.inner_text("#person-title") == "User 13" and page.url.endswith("#user=13&a=rankmixer")

    # The history: as many dots as events, and what one was.
    history = service.user("13")["history"]
    assert page.locator(".timeline .dot").count() == sum(map(len, history.values()))
    page.locator(".timeline .dot").last.hover()
    assert re.search(r"\d+ \w{3} 199[78], [\d:]+ UTC · disliked · item \d+", page.inner_text("#event"))
    page.get_by_role("button", name="by time").click()
    assert page.get_by_role("button", name="by time").get_attribute("aria-pressed") == "true"

    # What retrieval found, and how ranking reordered it.
    answer = next(found for path, found in service.answers if path == "/v1/recommend")
    assert ids(page, "right") == [str(row["id"]) for row in answer["items"]]
    places = [int(text) for text in page.locator("#left .place").all_inner_texts()]
    assert places == sorted(places) and places[:5] == [1, 2, 3, 4, 5]
    assert set(ids(page, "left")) >= set(ids(page, "right"))
    assert page.locator("#links path").count() == 20
    for step in ("300\nin the catalogue", "−40\nseen before", "260\nretrieved by rankmixer", "20\nranked by rankmixer"):
        assert step in page.inner_text("#funnel")
    assert "12.0 ms" in page.inner_text("#timing") and "candidates 6.10" in page.inner_text("#timing")

    # One item: its scores, its tokens.
    second = page.locator("#right .row").nth(1)
    second.click()
    page.wait_for_selector(".ablation li")
    assert page.inner_text("#item-title") == f"Item {answer['items'][1]['id']}"
    assert page.locator(".ablation li").count() == len(page_service.TOKENS)
    assert page.locator(".tasks li").all_inner_texts()[0].startswith("like")
    assert page.locator("#links path.hot").count() == 1

    # Another moment, then another event: the list moves and says so.
    before = ids(page, "right")
    said = change(page, "weekday", "6")
    assert "weekday: 4 → 6" in said and re.search(r"\d+ up", said) and "Largest move: item" in said
    after = ids(page, "right")
    assert before != after and page.locator("#right .badge.up").count()
    has(page, "#live", "weekday: 4 → 6")
    page.get_by_role("button", name="Back to the defaults").click()
    has(page, "#moved", "Context back to its defaults")
    assert ids(page, "right") == before
    last = history["rated"][-1]["time"]
    page.get_by_role("button", name="Add event").click()
    has(page, "#moved", "Event: item")
    (event,) = next(body["events"] for path, body in service.requests if path == "/v1/events")
    assert event == {"event_id": event["event_id"], "user": 13, "time": last + 60, "like": 1, "dislike": 0} | {
        "item_id": int(before[1])
    }
    assert page.locator(".dot.fresh").count() == 2 and before[1] not in ids(page, "right")

    # Two models.
    page.select_option("#model-b", "hstu")
    page.wait_for_selector("#pair[data-view=compare]")
    shared = set(ids(page, "left")) & set(ids(page, "right"))
    assert page.locator("#links path").count() == len(shared)
    assert page.inner_text("#lists-title").startswith(f"{len(shared)} of 20 items shared, Kendall’s τ")
    assert page.locator("#right .row:not(.muted)").count() == len(shared)
    assert page.locator("#timing .time").count() == 2
    has(page, "#item-body", "It has no tokens.")
    page.get_by_role("button", name="Retrieval → A").click()
    assert page.get_attribute("#pair", "data-view") == "ranking"
    page.reload()  # the address holds who and which models
    page.wait_for_selector("#pair[data-view=compare]")
    assert page.inner_text("#person-title") == "User 13"


@needs_chromium
def test_by_keyboard_alone(service, url, tab):
    page = tab(url)
    page.wait_for_selector("#cards li")
    focused = "document.activeElement.id || document.activeElement.dataset.id"
    keys = page.keyboard
    keys.press("/")
    assert page.evaluate(focused) == "search"
    keys.type("2")
    page.wait_for_selector("#found li")
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    chosen = page.locator("#found [aria-selected=true]").inner_text()
    keys.press("Enter")
    page.wait_for_selector("#right .row")
    assert page.inner_text("#person-title") == f"User {chosen}"

    for _ in range(40):  # to the list by Tab, past everything else
        keys.press("Tab")
        if page.evaluate("document.activeElement.closest('#right') !== null"):
            break
        assert page.evaluate(VISIBLE), page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    best = ids(page, "right")
    assert page.evaluate(focused) == best[0]
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    assert page.evaluate(focused) == best[2] and page.inner_text("#item-title") == f"Item {best[2]}"
    keys.press("ArrowLeft")
    assert page.evaluate("document.activeElement.closest('#left') !== null") and page.evaluate(focused) == best[2]
    keys.press("Home")
    assert page.evaluate(focused) == ids(page, "left")[0]
    assert "not in the 20" in page.inner_text("#item-body").lower()

    page.locator(".dot[tabindex='0']").focus()
    was = page.inner_text("#event")
    keys.press("ArrowLeft")
    keys.press("ArrowDown")
    assert page.inner_text("#event") != was and "liked" in page.inner_text("#event")
    assert page.locator(".dot[tabindex='0']").count() == 1


@needs_chromium
def test_on_a_phone(url, tab):
    page = tab(url, viewport=PHONE, has_touch=True)
    page.wait_for_selector("#cards li")
    assert page.evaluate(WIDE) <= 0
    look_at(page, "13")
    assert page.evaluate(WIDE) <= 0
    page.locator("#whatif summary").click()
    change(page, "weekday", "6")
    assert page.evaluate(WIDE) <= 0
    assert not page.is_visible("#item")
    row = page.locator("#right .row").nth(2)
    row.click()
    page.wait_for_selector("#item.sheet .ablation li")
    assert page.evaluate(WIDE) <= 0
    page.get_by_role("button", name="Close").click()
    assert not page.is_visible("#item") and row.evaluate("node => node === document.activeElement")
    page.select_option("#model-b", "hstu")
    page.wait_for_selector("#pair[data-view=compare]")
    page.locator("#raw summary").click()
    assert page.evaluate(WIDE) <= 0


@needs_chromium
def test_somebody_nobody_knows(service, url, tab):
    page = tab(url)
    look_at(page, "777")
    assert "Nobody knows this user" in page.inner_text("#event")
    assert "cold" in page.inner_text("#person-badges") and page.inner_text("#left-title") == "Most popular"
    assert not any(path == "/v1/users/777" for path, _ in service.requests), "a 404 would be an error in the console"
    page.get_by_role("button", name="Add event").click()
    has(page, "#moved", "Event: item")
    assert page.locator(".dot").count() == 2 and "cold" not in page.inner_text("#person-badges")


@needs_chromium
def test_without_retrieval(service, url, tab):
    service.retrieves = False
    page = tab(f"{url}#user=5")
    page.wait_for_selector("#right .row")
    assert "popularity list" in page.inner_text("#person-badges").lower()
    assert page.locator("#left .value").first.inner_text() == ""
    page = tab(f"{url}#user=5&a=hstu")
    page.wait_for_selector("#right .row")
    assert "This model reads no column" in page.inner_text("#context-form")


@needs_chromium
def test_data_is_never_markup(service, url, tab):
    _, past = service.users["7"]
    past[-1]["year"] = NASTY
    service.users[NASTY] = (NASTY, past)
    page = tab(url)
    look_at(page, NASTY)
    assert page.inner_text("#person-title") == f"User {NASTY}" and NASTY in page.inner_text("#columns")
    page.locator("#timeline .dot").nth(39).hover()
    assert NASTY in page.inner_text("#event")
    assert page.locator("img:not(.brand img)").count() == 0


def test_sources_write_no_markup_and_nothing_inline():
    sources = {file.name: file.read_text() for file in PAGE.iterdir() if file.suffix in (".js", ".html", ".css")}
    for name, text in sources.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), f"{name}: another host"
        assert len(text.splitlines()) <= 400, name
        for wanted in re.findall(r'from "\./([\w.]+)"', text):
            assert wanted in sources, f"{name} imports {wanted}"
    html = sources["index.html"]
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src=)", html)
    ids_there = re.findall(r'\sid="([\w-]+)"', html)
    assert len(ids_there) == len(set(ids_there))
    wanted = {name for text in sources.values() for name in re.findall(r'\$\("#([\w-]+)"\)', text)}
    assert wanted <= set(ids_there), wanted - set(ids_there)


@needs_chromium
def test_the_key_stays_in_the_tab(service, url, tab):
    service.key = "sr_right"
    page = tab(url, expected="401")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "sr_wrong")
    page.keyboard.press("Enter")
    has(page, "#key-title", "not accepted")
    page.fill("#key", "sr_right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards li")
    look_at(page, "3")
    assert page.evaluate("Object.values(sessionStorage)") == ["sr_right"]
    assert page.evaluate("localStorage.length") == 0 and "sr_right" not in page.content()
    assert "$SCALEREC_KEY" in page.text_content("#curl")


@needs_chromium
def test_errors_are_said_in_words(service, url, tab):
    page = tab(url, expected="503|422|net::|Failed to load")
    look_at(page, "13")
    before = ids(page, "right")
    service.refusals += [Refusal(503, "the queue is full", **{"Retry-After": "2"})]
    page.get_by_label("weekday", exact=True).fill("5")
    page.wait_for_selector("#alert:not([hidden])")
    said = page.inner_text("#alert")
    assert "busy" in said and "the queue is full" in said and "wait 2 seconds" in said
    assert ids(page, "right") == before, "the last list stays"
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#moved:not([hidden])")
    assert not page.is_visible("#alert") and "weekday: 4 → 5" in page.inner_text("#moved")
    page.route("**/v1/recommend", lambda route: route.abort("connectionrefused"))
    page.get_by_label("weekday", exact=True).fill("3")
    page.wait_for_selector("#alert:not([hidden])")
    assert "does not answer" in page.inner_text("#alert")


@needs_chromium
def test_an_event_that_is_sent_again_is_the_same_event(service, url, tab):
    page = tab(f"{url}#user=13", expected="Failed to load")
    page.wait_for_selector("#right .row")
    page.route("**/v1/events", lambda route: (route.fetch(), route.abort()), times=1)  # written, but nobody heard
    page.get_by_role("button", name="Add event").click()
    page.get_by_role("button", name="Try again").click()
    has(page, "#moved", "Event: item")
    first, second = [body["events"] for path, body in service.requests if path == "/v1/events"]
    assert first == second and len(service.users["13"][1]) == 41


@needs_chromium
def test_numbers_of_64_bits_stay_whole(service, url, tab):
    user = 2**53 + 1
    service.users[str(user)] = (user, service.users["4"][1])
    page = tab(url)
    look_at(page, str(user))
    page.wait_for_selector(".ablation li")
    bodies = [body for path, body in service.requests if path in ("/v1/recommend", "/v1/explain")]
    assert len(bodies) == 2 and all(body["user"] == user for body in bodies)


@needs_chromium
def test_calm_where_motion_is_not_wanted(url, tab):
    moving = tab(f"{url}#user=13")
    still = tab(f"{url}#user=13", reduced_motion="reduce")
    for page, runs in ((moving, True), (still, False)):
        page.wait_for_selector("#right .row")
        until(page, SETTLED)
        page.evaluate(COUNTED)
        change(page, "weekday", "6")
        assert (page.evaluate("window.moves") > 0) == runs


@needs_chromium
def test_the_stand_in_answers_as_the_service_would(service, url, tab):
    answers = pytest.importorskip("scalerec.serving.answers")
    requests = pytest.importorskip("scalerec.serving.requests")
    page = tab(f"{url}#user=13")
    page.wait_for_selector(".ablation li")
    page.locator("#left .row").first.click()
    change(page, "weekday", "6")
    page.get_by_role("button", name="Add event").click()
    has(page, "#moved", "Event: item")
    kinds = {"recommend": "Recommended", "rank": "Ranked", "explain": "Explained", "events": "Appended"}
    kinds |= {"models": "Models", "users": "Users"}
    seen = set()
    for path, answer in service.answers:
        parts = path.split("/")[2:]
        kind = kinds[parts[0]] if len(parts) == 1 else {"users": "User", "items": "ItemRow"}[parts[0]]
        getattr(answers, kind).model_validate(answer)
        seen.add(kind)
    assert seen == {*kinds.values(), "User", "ItemRow"}
    for path, body in service.requests:
        if body is not None:
            kind = f"{path.removeprefix('/v1/').capitalize()}Request"
            requests.read(getattr(requests, kind), json.dumps(body).encode())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A ranker of rows and a model of lives that retrieves and ranks: folder of the run, folder of the bundle."""
    pytest.importorskip("fastapi")
    from scalerec.data.sources.sequences import Sequences
    from scalerec.data.sources.synthetic import Synthetic
    from scalerec.inference import bundle
    from scalerec.models import rankmixer
    from scalerec.models.hstu import HSTUConfig
    from scalerec.training.run import Run
    from scalerec.training.train import train

    log, root = Synthetic(rows=2_000), tmp_path_factory.mktemp("page")
    joint = HSTUConfig(dim=8, qk_dim=8, v_dim=8, goal="joint", actions="interleaved")
    lives = Sequences(of=log, protocol="validated", max_len=20)
    options = {"tensorboard": False, "threads": 1, "batch_size": 64, "epochs": 1}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEREC_CACHE", str(root / "cache"))
        for name, data, model in (("ranker", log, rankmixer.tiny()), ("joint", lives, joint)):
            run = Run.model_validate({"name": name, "data": data, "model": model, "training": options, "dim": 8})
            train(run, root / f"run-{name}", quiet=True)
            bundle.export(root / f"run-{name}", root / name, name=name)
            found[name] = (root / f"run-{name}", root / name)
    return found


@pytest.fixture(scope="module")
def live(bundles: dict[str, tuple[Path, Path]]) -> Iterator[str]:
    """The real service with both models and everybody's history."""
    import uvicorn

    from scalerec.serving.app import create_app, open_service
    from scalerec.serving.seed import seed
    from scalerec.serving.settings import Settings

    settings = Settings(bundles=tuple(folder for _, folder in bundles.values()), port=0)
    service = open_service(settings)
    for name, (run, _) in bundles.items():
        seed(run, service.states.of(service.models.by_name[name].engine.schema).store)
    config = uvicorn.Config(create_app(settings, service), port=0, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.slow
@needs_chromium
def test_in_front_of_the_real_service(live, tab):
    page = tab(live)
    has(page, "#cards", "ranks and retrieves")
    page.get_by_role("button", name="Random user").first.click()
    page.wait_for_selector("#right .row")
    assert page.locator("#right .row").count() == 20 and page.locator("#links path").count() == 20
    assert "retrieved by joint" in page.inner_text("#funnel") and "candidates" in page.inner_text("#timing")
    assert {"clicked", "events"} <= set(page.locator(".timeline .lane").all_text_contents())
    page.wait_for_selector(".ablation li")
    page.locator("#left .row.muted").first.click()
    has(page, "#item-body", "not in the 20")
    page.wait_for_selector(".ablation li")

    # A column of the moment, set to values that the log has, until the list moves.
    column = page.locator("#context-form label span").first.inner_text()
    said = [change(page, column, value) for value in ("1", "2", "3")]
    assert f"{column}: 1 → 2" in said[1] and any("up" in text or "new" in text for text in said)

    events = page.locator(".dot").count()
    gone = page.locator("#right .row").first.get_attribute("data-id")
    page.locator("#right .row").first.click()
    page.get_by_role("button", name="Add event").click()
    has(page, "#moved", f"Event: item {gone}, click")
    assert page.locator(".dot").count() > events or page.locator(".dot.fresh").count()
    assert gone not in ids(page, "right"), "it has been seen now"

    page.select_option("#model-b", "joint")
    page.wait_for_selector("#pair[data-view=compare]")
    assert "items shared" in page.inner_text("#lists-title")
    page.locator("#right .row").first.click()
    has(page, "#item-body", "joint")
    until(page, "document.querySelectorAll('#item-body .of-model').length === 2")

    look_at(page, "123456789")
    has(page, "#person-badges", "cold")
    has(page, "#person-badges", "popularity list")
    assert not page.is_visible("#alert")
