"""The script and style of the page of an evaluation: filters items, and shows those that match, a page at a time.

Text of models and data sets gets into the document through ``textContent`` alone. The filters are in the address behind
``#``, so that a link shows the same items.
"""

SCRIPT = r"""
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20, MOST_TEXT = 20000;
const PROBLEM = 1, TRUNCATED = 2, NO_FORMAT = 4;
const HIDDEN = new RegExp("[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b-\\u200f\\u2028-\\u202e"
  + "\\u2060-\\u2069\\ufeff\\ud800-\\udfff]", "u");  // with "u" only those surrogates that have no partner
const form = document.getElementById("filters"), list = document.getElementById("list");
const status = document.getElementById("count"), categories = document.getElementById("categories");
const SIMPLE = ["benchmark", "model", "condition", "protocol", "verdict", "state", "differs", "text"];
let page = 0, only = "", unknown = [], found = [];

// Elements and text. Characters that would not be seen, or would turn text around, become their number.
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}
function visible(node, text) {
  let plain = "";
  for (const character of String(text)) {
    if (!HIDDEN.test(character)) { plain += character; continue; }
    if (plain) node.append(document.createTextNode(plain));
    plain = "";
    const mark = make("span", "special");
    mark.textContent = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(mark);
  }
  if (plain) node.append(document.createTextNode(plain));
  return node;
}
function textOf(tag, className, text) {
  const node = visible(make(tag, className), text);
  node.dir = "auto";
  return node;
}

// Filters.
function field(name) { return form.elements.namedItem(name); }
function value(name) { const input = field(name); return input ? input.value : ""; }
function benchmarkChosen() {
  if (data.benchmarks.length === 1) return 0;
  return data.benchmarks.findIndex(benchmark => benchmark.name === value("benchmark"));
}
function showCategories() {
  const number = benchmarkChosen(), kept = {};
  for (const select of categories.querySelectorAll("select")) kept[select.name] = select.value;
  categories.replaceChildren();
  if (number < 0) return;
  data.benchmarks[number].axes.forEach((axis, place) => {
    const names = new Set();
    for (const item of data.items) if (item.b === number) names.add(item.c[place]);
    const select = make("select");
    select.name = "category." + axis;
    select.append(new Option("any", ""));
    for (const name of [...names].sort()) select.append(new Option(visible(make("span"), name).textContent, name));
    if (kept[select.name]) select.value = kept[select.name];
    if (select.selectedIndex < 0) select.value = "";
    categories.append(make("label", "", visible(make("span"), axis), select));
  });
}
function words(item) {
  if (item.words === undefined) {
    const texts = item.r.flatMap(run => run.t);
    item.words = [item.id, item.q, item.s, ...item.o, ...texts].join("\n").toLowerCase();
  }
  return item.words;
}
function readFilters() {
  const number = name => value(name) === "" ? -1 : Number(value(name));
  const axes = [...categories.querySelectorAll("select")].map(select => select.value);
  return {
    benchmark: benchmarkChosen(), model: number("model"), condition: number("condition"),
    protocol: Math.max(number("protocol"), 0), verdict: value("verdict"), state: value("state"),
    differs: value("differs"), text: value("text").trim().toLowerCase(), axes,
  };
}
function isRight(run, protocol) { return run.j[protocol] && run.j[protocol][0] === 1; }
function runMatches(run, item, f) {
  const verdict = run.j[f.protocol];
  if (f.verdict && !verdict) return false;
  if (f.verdict === "right" && verdict[0] !== 1) return false;
  if (f.verdict === "wrong" && verdict[0] !== 0) return false;
  if (f.verdict === "partial" && (verdict[0] === 0 || verdict[0] === 1)) return false;
  if (f.state === "problem" && !(run.f & PROBLEM)) return false;
  if (f.state === "truncated" && !(run.f & TRUNCATED)) return false;
  if (f.state === "no_format" && !(run.f & NO_FORMAT)) return false;
  if (f.state === "unread" && (run.f & PROBLEM || !verdict || verdict[1] !== null)) return false;
  const scores = run.j.filter(judged => judged).map(judged => judged[0]);
  if (f.differs === "protocols" && !scores.some(score => score !== scores[0])) return false;
  if (f.differs === "models" && !item.r.some(other => other.m !== run.m && other.c === run.c
      && verdict && other.j[f.protocol] && other.j[f.protocol][0] !== verdict[0])) return false;
  return true;
}
function matchingRuns(item, f) {
  return item.r.filter(run => (f.model < 0 || run.m === f.model) && (f.condition < 0 || run.c === f.condition)
    && runMatches(run, item, f));
}
function itemMatches(item, f) {
  if (f.benchmark >= 0 && item.b !== f.benchmark) return false;
  if (f.axes.some((name, place) => name !== "" && item.c[place] !== name)) return false;
  if (f.text && !words(item).includes(f.text)) return false;
  return matchingRuns(item, f).length > 0;
}

// The address behind "#". One without "=" is a place of the page, and no filter.
function readAddress() {
  const address = location.hash.slice(1);
  unknown = [];
  if (!address.includes("=")) return;
  const asked = new URLSearchParams(address);
  for (const input of form.querySelectorAll("select, input")) input.value = "";
  const apply = (name, text) => {
    const input = field(name);
    if (!input) return false;
    const names = {model: data.models, condition: data.conditions, protocol: data.protocols}[name];
    const index = names ? names.indexOf(text) : -1;
    // The first protocol is the one that is chosen where none is.
    input.value = names ? (index < 0 || (name === "protocol" && index === 0) ? "" : String(index)) : text;
    return names ? index >= 0 : input.value === text;
  };
  const known = new Set([...SIMPLE, "page", "item"]);
  for (const name of SIMPLE) if (asked.has(name) && !apply(name, asked.get(name))) unknown.push(name);
  showCategories();
  for (const [name, text] of asked) {
    if (name.startsWith("category.") ? !apply(name, text) : !known.has(name)) unknown.push(name);
  }
  page = Math.max((parseInt(asked.get("page"), 10) || 1) - 1, 0);
  only = asked.get("item") || "";
}
function address(item) {
  const asked = new URLSearchParams();
  const names = {model: data.models, condition: data.conditions, protocol: data.protocols};
  if (item) asked.set("benchmark", data.benchmarks[item.b].name);
  else for (const input of form.querySelectorAll("select, input")) {
    if (input.value) asked.set(input.name, names[input.name] ? names[input.name][Number(input.value)] : input.value);
  }
  if (item || only) asked.set("item", item ? item.id : only);
  if (!item && page) asked.set("page", String(page + 1));
  return "#" + asked.toString();
}
function writeAddress() {
  const wanted = address(null);
  const now = location.hash === "" ? "#" : location.hash;
  if (wanted === now || (wanted === "#" && !now.includes("="))) return;
  try { history.replaceState(null, "", wanted === "#" ? "#items" : wanted); } catch (error) { /* not on this page */ }
}

// What is shown.
function mark(score) { return score === 1 ? "\u2713" : score === 0 ? "\u2717" : score.toFixed(2); }
function badge(name, judged) {
  const node = make("span", "badge " + (judged[0] === 1 ? "good" : judged[0] === 0 ? "bad" : "part"));
  node.append(name + " " + mark(judged[0]));
  return node;
}
function runNode(item, run, isOpen) {
  const node = make("details", "run"), summary = make("summary");
  const condition = data.conditions[run.c].replace(/^\d+/, "$& frames");
  const name = [data.models.length > 1 ? data.models[run.m] : "", condition].filter(text => text);
  summary.append(visible(make("b"), name.join(" \u00b7 ")), " ");
  run.j.forEach((judged, place) => { if (judged) summary.append(badge(data.protocols[place], judged), " "); });
  const words = [run.f & PROBLEM ? "problem" : "", run.f & TRUNCATED ? "truncated" : "",
    run.f & NO_FORMAT && !(run.f & PROBLEM) ? "no format" : ""];
  summary.append(make("span", "missing", words.filter(word => word).join(", ")));
  node.append(summary);
  const fill = () => {
    if (node.childElementCount > 1) return;
    if (run.p) node.append(textOf("p", "missing", "Could not be asked, so it counts as wrong: " + run.p));
    const read = make("ul", "verdicts");
    run.j.forEach((judged, place) => {
      if (!judged || run.f & PROBLEM) return;
      const line = make("li", "", badge(data.protocols[place], judged), " ");
      if (judged[1] === null) line.append(make("span", "missing", "found no answer"));
      else line.append("read ", textOf("code", "", judged[1]));
      read.append(line);
    });
    node.append(read);
    run.t.forEach((text, place) => {
      if (run.t.length > 1) node.append(make("h5", "", "Response " + (place + 1) + " of " + run.t.length));
      const isLong = text.length > MOST_TEXT;
      const box = textOf("pre", "prompt", isLong ? text.slice(0, MOST_TEXT) : text || "(empty)");
      node.append(box);
      if (isLong) node.append(make("p", "missing", "The rest of the response is in answers.jsonl."));
    });
    const numbers = ["frames", "response tokens", "prompt tokens", "seconds"];
    const facts = make("p", "facts");
    numbers.forEach((label, place) => facts.append(make("span", "", label + " ", make("b", "", String(run.n[place])))));
    node.append(facts);
  };
  node.addEventListener("toggle", () => { if (node.open) fill(); });
  if (isOpen) { fill(); node.open = true; }
  return node;
}
function mediumNode(medium) {
  const node = make("div", "strip"), facts = textOf("p", "facts", medium.name);
  node.append(facts);
  if (medium.problem) { node.append(textOf("p", "missing", "Not shown: " + medium.problem)); return node; }
  const image = make("img");
  image.loading = "lazy";
  image.width = medium.width;
  image.height = medium.height;
  image.alt = medium.captions.length + " frames of " + facts.textContent;
  image.addEventListener("error", () => image.replaceWith(make("p", "missing", "The picture is not beside the page.")));
  image.src = medium.url;
  facts.append(" ", make("span", "", medium.captions.join(", ") + (medium.num_sampled > medium.captions.length
    ? " of " + medium.num_sampled + " frames" : "")));
  node.append(make("div", "filmstrip", image));
  node.lastChild.tabIndex = 0;
  return node;
}
function itemNode(item, runs) {
  const benchmark = data.benchmarks[item.b], node = make("article", "group");
  const heading = textOf("h4", "", benchmark.title + " " + item.id), link = make("a", "note", "link");
  link.href = address(item);
  heading.append(" ", link);
  const facts = make("p", "facts");
  benchmark.axes.forEach((axis, place) => {
    facts.append(make("span", "", visible(make("span"), axis + " "), visible(make("b"), item.c[place])));
  });
  node.append(heading, facts, textOf("p", "problem", item.q));
  if (item.o.length) {
    const options = make("ul", "options");
    for (const option of item.o) options.append(textOf("li", "", option));
    node.append(options);
  }
  node.append(make("p", "right", make("strong", "", "Solution: "), textOf("span", "", item.s)));
  for (const number of item.v) node.append(mediumNode(data.media[number]));
  item.r.forEach(run => node.append(runNode(item, run, run === runs[0])));
  return node;
}
function show(isNewPage) {
  const f = readFilters();
  found = data.items.filter(item => (!only || item.id === only) && itemMatches(item, f));
  const pages = Math.max(Math.ceil(found.length / PAGE), 1);
  page = Math.min(page, pages - 1);
  const shown = found.slice(page * PAGE, (page + 1) * PAGE);
  list.replaceChildren(...shown.map(item => itemNode(item, matchingRuns(item, f))));
  const count = found.length.toLocaleString("en") + " of " + data.items.length.toLocaleString("en") + " items";
  status.replaceChildren(count + (pages > 1 ? ", page " + (page + 1) + " of " + pages : ""));
  if (only) status.append(visible(make("span"), ", only item " + only));
  if (unknown.length) {
    status.append(visible(make("span", "missing"), "; not understood in the address: " + unknown.join(", ")));
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.disabled = page + Number(button.dataset.step) < 0 || page + Number(button.dataset.step) >= pages;
  }
  writeAddress();
  if (isNewPage) document.getElementById("items").scrollIntoView();
}
let waiting = 0;
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("input", event => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    page = 0; only = ""; unknown = [];
    if (event.target.name === "benchmark") showCategories();
    show(false);
  }, event.target.name === "text" ? 200 : 0);
});
form.addEventListener("reset", () => setTimeout(() => {
  if (location.hash.includes("=")) history.replaceState(null, "", "#items");
  page = 0; only = ""; unknown = []; showCategories(); show(false);
}));
for (const button of document.querySelectorAll("[data-step]")) {
  button.addEventListener("click", () => { page += Number(button.dataset.step); show(true); });
}
window.addEventListener("hashchange", () => { if (location.hash.includes("=")) { readAddress(); show(true); } });
showCategories();
readAddress();
show(location.hash.includes("="));
document.documentElement.dataset.ready = "yes";
})();
"""

STYLE = """
.accuracies { max-width: 1000px; }
.accuracies .note { white-space: nowrap; }
.figures { margin: 4px 0 8px; }
.figures caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.figures thead th { color: var(--soft); border-bottom: 1px solid var(--edge); vertical-align: bottom; }
.figures td, .figures th { padding: 3px 14px 3px 0; font-variant-numeric: tabular-nums; }
.figures td { white-space: nowrap; }
.figures td.long { white-space: normal; min-width: 12em; max-width: 34em; overflow-wrap: anywhere; }
.figures tbody tr:nth-child(even) { background: var(--fill); }
.warning { border-left: 4px solid var(--warn); padding: 6px 12px; background: var(--fill); }
#filters { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: end; background: var(--fill); padding: 10px 14px;
  border-radius: 8px; }
#filters label { display: flex; flex-direction: column; font-size: .8rem; color: var(--soft); max-width: 100%; }
#filters select, #filters input, button { font: inherit; font-size: .9rem; color: var(--text); background: var(--panel);
  border: 1px solid var(--edge); border-radius: 6px; padding: 4px 8px; max-width: min(100%, 22em); min-height: 34px; }
#categories { display: contents; }
.pager { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 12px 0; }
.badge { border: 1px solid currentColor; border-radius: 6px; padding: 0 6px; font-size: .8rem; white-space: nowrap; }
.badge.good { color: var(--right); } .badge.bad { color: var(--warn); } .badge.part { color: var(--c0); }
.run { border-top: 1px solid var(--edge); padding-top: 6px; }
.run summary { color: var(--text); line-height: 1.8; }
.verdicts { list-style: none; padding: 0; margin: 0 0 8px; font-size: .85rem; }
.verdicts code { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
.filmstrip { overflow-x: auto; }
.filmstrip img { display: block; border-radius: 4px; background: var(--fill); }
header, #list, .accuracies th { overflow-wrap: anywhere; }
.facts > *, .options li { min-width: 0; }
.pager p { margin: 0; }
#filters input { min-width: 15em; }
#items { scroll-margin-top: 12px; }
#list { min-height: 40vh; }
"""
