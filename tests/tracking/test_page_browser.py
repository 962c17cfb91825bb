"""The page of 2,000 studies in a browser: nothing is fetched, nothing that a report says is run, and a reader finds a
study.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.tracking.page import write_page
from tests.tracking.page_runs import EVIL, large_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no chromium and chromedriver on this machine: `make browser` installs them", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,900"
).split()


class Browser:
    """A page in headless Chromium, with the few things that the tests do to it."""

    def __init__(self, path: Path, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.path = path
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def press(self, keys: str) -> None:
        self.run("document.activeElement.blur()")
        self.find("body").send_keys(keys)

    def search(self, words: str) -> None:
        self.run(
            "const box = document.getElementById('search'); box.value = arguments[0]; box.dispatchEvent(new "
            "Event('input'))",
            words,
        )

    def wait(self, condition: Any) -> None:
        WebDriverWait(self.driver, 10, poll_frequency=0.05).until(lambda driver: condition())

    def found(self) -> int:
        return int(self.text("#found").split(" of ")[0].replace(",", ""))

    def wide(self) -> int:
        return int(self.run("return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("page")
    run, studies = large_run(folder)
    opened = Browser(write_page(run, studies), folder / "profile")
    yield opened
    opened.driver.quit()


@pytest.fixture(autouse=True)
def _fresh(browser: Browser) -> None:
    """Without filters, at the test studies' first one."""
    browser.run(
        "document.getElementById('help').close(); document.querySelector('button.set').click(); "
        "document.getElementById('clear').click()"
    )
    browser.run("document.querySelector('#list button').click()")


def shown(browser: Browser) -> int:
    """How many of the 2,000 test studies found room."""
    return int(browser.run("return DATA.sets[0].cards.length"))


def test_the_page_opens_from_disk_and_asks_nobody_for_anything(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert browser.path.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "chrome:", "chrome-untrusted:"))] == []
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_it_stays_under_its_bound_and_says_what_is_left_out(browser):
    assert browser.path.stat().st_size < 15_000_000
    notes = browser.text("#notes")
    left = int(re.search(r"([\d,]+) of 2,000 evaluated studies", notes)[1].replace(",", ""))
    assert left == 2000 - shown(browser) and left > 0
    without = browser.run("return DATA.sets.flatMap((part) => part.cards).filter((card) => !card.images.length).length")
    assert (
        f"the radiographs of {without:,} of the {shown(browser) + 40 - left_of_training(browser):,} studies shown"
        in notes
    )
    longest = browser.run("return DATA.sets[0].cards[7].at[1].samples[0].report")
    assert re.fullmatch(r".* z{5000,} … \[5\d,\d\d\d more letters are left out of this page\]", longest)


def left_of_training(browser: Browser) -> int:
    return 40 - int(browser.run("return DATA.sets[1].cards.length"))


def test_what_a_report_says_is_shown_and_never_run(browser):
    for place, said in enumerate(
        (
            EVIL,
            "</script><img src=x onerror=alert(1)>",
            "<!-- <script> unclosed <i",
            "naïve ☃ 胸部 \u2028 \U0001f600 {{ 7 * 7 }}",
        )
    ):
        browser.run("document.querySelectorAll('#list button')[arguments[0]].click()", place)
        assert said in browser.run("return [...document.querySelectorAll('#card .report')].at(-1).textContent")
    assert (
        browser.run(
            "return document.querySelectorAll('#card :is(script, b:not(.rewards b), i, .text img), #list "
            ":is(script, b)').length"
        )
        == 0
    )
    assert browser.run("return document.querySelector('#card img').naturalWidth") == 384
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.ran = true'; document.body.append(s)"
    )
    assert browser.run("return window.ran === undefined")  # the policy names the page's own scripts and no other


def test_search_filters_and_their_counts(browser):
    studies = range(shown(browser))
    invented, polarity = [n for n in studies if n % 3], [n for n in studies if n % 3 == 0]
    expected = {
        "agree": len(invented),
        "invented": len(invented),
        "polarity": len(polarity),
        "missed": len([n for n in polarity if n % 2]),
    }
    counts = {kind: browser.text(f"label.badge.{kind} .count").replace(",", "") for kind in expected}
    assert counts == {kind: str(number) for kind, number in expected.items()}
    browser.run("document.querySelector('input[value=missed]').click()")
    assert browser.found() == expected["missed"]
    browser.run("document.getElementById('clear').click()")
    Select(browser.find("#observation")).select_by_value("Edema")
    browser.run("document.querySelector('input[value=invented]').click()")
    assert browser.found() == len([n for n in invented if n % 2 == 0])
    browser.run("document.getElementById('clear').click()")
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.search("NUMBER-1234-after <script>alert")
    browser.wait(lambda: browser.found() == 0)
    browser.search("number-1235-after <SCRIPT>alert")
    browser.wait(lambda: browser.found() == 1)
    assert browser.text("#card h3") == "study-01235"


def test_keys_move_from_study_to_study_and_open_the_help(browser):
    names = []
    for key in ("j", "j", Keys.ARROW_RIGHT, "k", Keys.ARROW_LEFT):
        browser.press(key)
        names.append(browser.text("#card h3"))
    assert names == [f"study-0000{n}" for n in (1, 2, 3, 2, 1)]
    assert browser.run("return document.querySelector('#list [aria-current]').textContent").startswith("study-00001")
    browser.press("?")
    assert browser.run("return document.getElementById('help').open")


def test_the_list_goes_on_where_a_key_comes_to_its_end(browser):
    assert browser.run("return document.querySelectorAll('#list .name').length") == 200
    browser.run("document.querySelectorAll('#list button')[199].click()")
    browser.press("j")
    assert browser.text("#list [aria-current] .name") == "study-00200"


def test_a_slider_follows_a_training_study_through_the_steps(browser):
    browser.run("document.querySelectorAll('button.set')[1].click()")
    browser.search("train-000")
    browser.wait(lambda: browser.found() == 1)
    assert "step 11 member 0" in browser.text("#card .pane:last-child .report")
    slider = browser.find("input.moment")
    slider.send_keys(Keys.HOME)
    assert (
        "<b>step 0 member 0</b>" in browser.text("#card .pane:last-child .report")
        and browser.text(".moments output") == "step 1"
    )
    slider.send_keys(Keys.ARROW_RIGHT)
    browser.run("document.querySelectorAll('.samples button')[3].click()")
    assert "step 1 member 3" in browser.text("#card .pane:last-child .report")


def test_a_think_text_is_found_folded_and_opened_by_a_key(browser):
    browser.run("document.querySelectorAll('button.set')[1].click()")
    browser.search("angle is blunted")
    browser.wait(lambda: browser.found() == 1)
    opened = "return document.querySelector('#card details.think').open"
    assert browser.text("#card .pane:last-child .report") == "Effusion." and "angle is blunted" in browser.text(
        "#card details.think"
    )
    assert not browser.run(opened)
    browser.press("t")
    assert browser.run(opened)
    browser.press("t")


def test_curves_are_drawn_and_smoothed(browser):
    browser.run(
        "document.documentElement.style.scrollBehavior = 'auto'; document.querySelector('.plots "
        "figure').scrollIntoView()"
    )
    browser.wait(lambda: browser.run("return document.querySelectorAll('.plots canvas').length") > 0)
    assert "novel/thing" in browser.text("#curves")
    last = []
    for weight in (0, 90):
        browser.run(
            "const s = document.getElementById('smoothing'); s.value = arguments[0]; s.dispatchEvent(new "
            "Event('input'))",
            weight,
        )
        last.append(float(browser.text(".plots figure .legend .value")))
    assert last[0] > last[1] > 0.4  # a rising curve is met later by its mean


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_by_day_and_night(browser, theme):
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        paper = (
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0)"
        )
        assert (browser.run(paper) > 600) == (theme == "light")
        browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
        for place in (0, 7):  # the second has 60,000 letters without a space
            browser.run("document.querySelectorAll('#list button')[arguments[0]].click()", place)
            assert browser.wide() <= 360
            assert browser.run(
                "return [...document.querySelectorAll('#card .text')].every((text) => text.scrollWidth <= "
                "text.clientWidth)"
            )
        browser.run("document.querySelectorAll('button.set')[1].click()")
        assert browser.wide() <= 360
        browser.run("document.getElementById('theme').click()")
        assert (browser.run(paper) > 600) == (theme == "dark")
        browser.run("document.getElementById('theme').click()")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.run("delete document.documentElement.dataset.theme")
