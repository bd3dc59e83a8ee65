"""The page in a real browser: `pytest -m browser`; needs chromium (apt-get install chromium) on the path."""

import html
import json
import re
import shutil
import subprocess

import pytest

from masformer.report.page import Section, Table, write_page
from masformer.report.sections import write_report

from .made import everything, write_eval, write_selection, write_train

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MINUS, DASH = "\u2212", "\u2013"
COLUMNS = {
    "name": ['b, "x"', "a", "=1+1", "c10", "c9"],
    "thousands": ["1,024", DASH, "900", "12,000", "5"],
    "minus": [f"{MINUS}0.3", "+0.2", DASH, f"{MINUS}0.25", "0.0"],
    "percent": ["72.9 %", "100.0 %", "9.5 %", DASH, "50.0 %"],
    "share": ["3/5", "1/2", "5/5", "0/5", "9/10"],
    "size": ["1.5 GB", "900 MB", "1.2 GiB", "5 kB", "10 B"],
    "range": ["16 to 31", "8 to 15", DASH, f"{MINUS}0.5 to +0.5", "1,024 to 2,047"],
}
RESULT = "<pre id='result'></pre>"
CLICK = """
const table = document.querySelector("table");
const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent.trim());
const result = { sorted: {}, buttons: [], errors: [] };
window.addEventListener("error", (event) => result.errors.push(event.message));
const headers = [...table.tHead.rows[0].cells];
headers.forEach((header, n) => {
  const button = header.querySelector("button");
  result.buttons.push(button.type + " " + button.tabIndex + " " + header.getAttribute("aria-sort"));
  const orders = [];
  for (let click = 0; click < 3; click++) {
    button.focus(); document.activeElement.click();
    orders.push([header.getAttribute("aria-sort"), column(n)]);
  }
  result.sorted[header.textContent.trim()] = orders;
});
result.scrolls = document.documentElement.scrollWidth > document.documentElement.clientWidth;
result.sortable = [...document.querySelectorAll("table")].every((t) => t.querySelector("thead button"));
URL.createObjectURL = (blob) => { result.blob = blob; return "data:,"; };
HTMLAnchorElement.prototype.click = function () { result.name = this.download; };
document.querySelector("button.csv").click();
result.blob.text().then((text) => {
  result.csv = text; result.type = result.blob.type;
  document.getElementById("result").textContent = JSON.stringify(result);
});
"""


def run(page, *flags):
    if CHROMIUM is None:
        pytest.skip("no chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    profile = page.parent / "profile"
    done = subprocess.run([*command, f"--user-data-dir={profile}", page.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0
    return done.stdout.decode()


def driven(page, script):
    """What `script` leaves in the element `result`, run behind the page's own script."""
    text = page.read_text("utf-8").replace("</body>", f"{RESULT}<script>{script}</script></body>")
    copy = page.with_name("driven.html")
    copy.write_text(text, "utf-8")
    dom = run(copy, "--virtual-time-budget=5000", "--dump-dom")
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.fixture
def small(tmp_path):
    table = Table(list(COLUMNS), list(zip(*COLUMNS.values(), strict=True)), "A table: of all kinds")
    return write_page(tmp_path / "page.html", title="t", sections=[Section("s", tables=[table])])


@pytest.fixture
def report(tmp_path):
    runs = [write_eval(tmp_path / "eval", everything(documents=3)), write_train(tmp_path / "train")]
    runs.append(write_selection(tmp_path / "select"))
    return write_report(runs, tmp_path / "report.html")


def test_columns_sort_up_down_and_back_and_dashes_stay_last(small):
    result = driven(small, CLICK)
    assert result["errors"] == []
    assert result["buttons"] == ["button 0 none"] * len(COLUMNS)
    up = {
        "name": ["=1+1", "a", 'b, "x"', "c9", "c10"],
        "thousands": ["5", "900", "1,024", "12,000"],
        "minus": [f"{MINUS}0.3", f"{MINUS}0.25", "0.0", "+0.2"],
        "percent": ["9.5 %", "50.0 %", "72.9 %", "100.0 %"],
        "share": ["0/5", "1/2", "3/5", "9/10", "5/5"],
        "size": ["10 B", "5 kB", "900 MB", "1.2 GiB", "1.5 GB"],
        "range": [f"{MINUS}0.5 to +0.5", "8 to 15", "16 to 31", "1,024 to 2,047"],
    }
    for name, values in up.items():
        last = [DASH] * (len(COLUMNS[name]) - len(values))
        assert result["sorted"][name] == [
            ["ascending", values + last],
            ["descending", values[::-1] + last],
            ["none", COLUMNS[name]],
        ]


def test_a_table_comes_down_as_csv(small):
    result = driven(small, CLICK)
    assert result["type"] == "text/csv;charset=utf-8"
    assert result["name"] == "a-table-of-all-kinds.csv"
    assert result["csv"].split("\r\n") == [
        "name,thousands,minus,percent,share,size,range",
        '"b, ""x""",1024,-0.3,72.9 %,3/5,1.5 GB,16 to 31',
        "a,,+0.2,100.0 %,1/2,900 MB,8 to 15",
        "'=1+1,900,,9.5 %,5/5,1.2 GiB,",
        "c10,12000,-0.25,,0/5,5 kB,-0.5 to +0.5",
        "c9,5,0.0,50.0 %,9/10,10 B,1024 to 2047",
        "",
    ]


def test_every_table_of_a_report_sorts_and_the_page_never_scrolls_sideways(report):
    frame = report.with_name("frame.html")
    text = CLICK.replace("document.getElementById", "parent.document.getElementById")
    inner = report.read_text("utf-8").replace("</body>", f"<script>{text}</script></body>")
    code = html.escape(inner, quote=True)
    frame.write_text(
        f"<body>{RESULT}<iframe style='width:360px;height:800px' srcdoc=\"{code}\"></iframe></body>", "utf-8"
    )
    dom = run(frame, "--virtual-time-budget=5000", "--dump-dom")
    result = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert result["errors"] == []
    assert result["sortable"]
    assert not result["scrolls"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn_in_light_and_dark(report, dark):
    from matplotlib import image

    picture = report.with_name("picture.png")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    run(report, "--window-size=800,3000", f"--screenshot={picture}", *scheme)
    pixels = image.imread(picture)[..., :3]
    assert (pixels[2, 2].mean() < 0.2) == dark
    assert pixels.std() > 0.03
