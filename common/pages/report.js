"use strict";
// The browser of problems. All texts go in as text nodes; what is shown stands in the address, after the #.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const state = { p: "", task: "", method: data.methods[0] || "", outcome: "", words: "" };
let found = []; // the problems that fit the filter
let at = 0; // which of them is shown
let writing; // the timer of an address to be written
let written = ""; // the last one that was; news of it may come when the next problem is shown

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- outcomes ----
const WORDS = { right: "\u2713 right in all seeds", wrong: "\u2717 wrong in all seeds",
                mixed: "\u25d0 right in", unscored: "\u2013 not scored" };

function outcome(problem, method) {
  const share = problem.outcomes[method];
  if (share === undefined || share === null) return "unscored";
  return share === 1 ? "right" : share === 0 ? "wrong" : "mixed";
}

function verdict(problem, method) {
  const kind = outcome(problem, method);
  const here = problem.shown[method] === 1 ? "in this one" : "not in this one"; // in the seed whose text stands there
  const share = kind === "mixed" ? ` ${Math.round(100 * problem.outcomes[method])} % of seeds, ${here}` : "";
  return make("span", { class: `outcome ${kind}` }, WORDS[kind] + share);
}

// ---- the filter ----
function haystack(problem) {
  const texts = [problem.task_id, problem.x, ...problem.y0, problem.f, ...Object.values(problem.texts)];
  return texts.join("\n").toLowerCase();
}

function hasOutcome(problem) {
  if (!state.outcome) return true;
  const [kind, other] = state.outcome.split(":");
  if (!other) return outcome(problem, state.method) === kind;
  const mine = problem.outcomes[state.method], theirs = problem.outcomes[other];
  if (typeof mine !== "number" || typeof theirs !== "number") return false;
  return kind === "better" ? mine > theirs : mine < theirs;
}

function fits(problem) {
  const words = state.words.toLowerCase().split(/\s+/);
  return (!state.task || problem.task === state.task) && hasOutcome(problem)
    && words.every((word) => problem.haystack.includes(word));
}

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, label]) => make("option", { value }, label)));
  select.value = choices.some(([value]) => value === chosen) ? chosen : choices[0][0];
}

function fillFilters() {
  const tasks = [...new Set(data.problems.map((problem) => problem.task))];
  fill($("task"), [["", "all"], ...tasks.map((task) => [task, task])], state.task);
  fill($("method"), data.methods.map((method) => [method, method]), state.method);
  const others = data.methods.filter((method) => method !== $("method").value);
  fill($("outcome"), [
    ["", "any"], ["right", "right in every seed"], ["wrong", "wrong in every seed"],
    ["mixed", "differs between seeds"], ["unscored", "not scored"],
    ...others.map((method) => [`better:${method}`, `better than ${method}`]),
    ...others.map((method) => [`worse:${method}`, `worse than ${method}`]),
  ], state.outcome);
  $("words").value = state.words;
  for (const name of ["task", "method", "outcome"]) state[name] = $(name).value;
}

// ---- one problem ----
function lines(text, known) {
  const each = text.split("\n").map((line) => {
    const isNew = line.trim() && !known.has(line.trim());
    return make(isNew ? "ins" : "span", { class: "line" }, line);
  });
  return make("pre", {}, ...each);
}

function flagged([before, step, after]) {
  const hidden = (text) => make("span", { class: "hidden" }, text);
  const marked = step ? [make("mark", {}, hidden("[flagged step: "), step, hidden("] "))] : [];
  return make("pre", {}, before, ...marked, after);
}

function card(title, body, verdictOf, heading = "h4") {
  const head = make(heading, {}, make("span", {}, title), ...(verdictOf ? [" ", verdictOf] : []));
  return make("section", { class: "panel" }, head, body);
}

function show(problem) {
  const text = problem.y0.join("");
  const known = new Set(text.split("\n").map((line) => line.trim()));
  const revisions = data.methods.map((method) => {
    const revision = problem.texts[method];
    const body = revision === undefined ? make("p", { class: "soft" }, "No text.") : lines(revision, known);
    return card(method, body, verdict(problem, method));
  });
  const step = problem.y0[1] ? "" : ", no step flagged";
  const about = `${problem.task}, ${problem.task_id}, horizon ${problem.horizon}${step}`;
  $("problem").replaceChildren(
    make("p", { class: "soft" }, about),
    card("Problem", make("pre", {}, problem.x), null, "h3"),
    make("h3", {}, "Attempt and critique"),
    make("div", { class: "cards" }, card("Attempt", flagged(problem.y0)), card("Critique", make("pre", {}, problem.f))),
    make("h3", {}, "Revisions"),
    make("div", { class: "cards" }, ...revisions),
  );
}

function draw() {
  found = data.problems.filter(fits);
  at = Math.max(0, found.findIndex((problem) => problem.task_id === state.p));
  const glyph = (problem) => WORDS[outcome(problem, state.method)][0];
  $("jump").replaceChildren(...found.map((problem, i) =>
    make("option", { value: i }, `${glyph(problem)} ${problem.task_id}`)));
  drawOne();
}

function drawOne() {
  const problem = found[at];
  $("place").textContent = problem ? `${at + 1} of ${found.length}` : "0 of 0";
  $("problem").hidden = !problem;
  for (const id of ["previous", "next", "jump"]) $(id).disabled = !problem;
  if (!problem) {
    $("place").textContent = "No problem fits the filter.";
    return;
  }
  state.p = problem.task_id;
  $("jump").value = String(at);
  show(problem);
}

function move(by) {
  if (!found.length) return;
  at = (at + by + found.length) % found.length;
  drawOne();
  writeAddress();
}

// ---- the address ----
const inAddress = () => new URLSearchParams(Object.entries(state).filter(([, value]) => value)).toString();

function writeAddress() { // not at every key of a held one: browsers stop taking addresses then
  clearTimeout(writing);
  writing = setTimeout(() => {
    written = inAddress();
    location.replace(`#${written}`);
  }, 150);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("p") || [written, inAddress()].includes(parts.toString())) return false;
  clearTimeout(writing);
  written = parts.toString();
  const first = data.methods[0] || "";
  for (const name of Object.keys(state)) state[name] = parts.get(name) || (name === "method" ? first : "");
  fillFilters();
  const wanted = data.problems.find((problem) => problem.task_id === state.p);
  if (wanted && !fits(wanted)) {
    Object.assign(state, { task: "", outcome: "", words: "" });
    fillFilters();
  }
  draw();
  if (!wanted) $("place").textContent = `That problem is not in this report. ${$("place").textContent}`;
  return true;
}

function start() {
  for (const problem of data.problems) problem.haystack = haystack(problem);
  fillFilters();
  draw();
  if (readAddress()) $("problems").scrollIntoView();
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", () => {
    for (const name of ["task", "method", "outcome", "words"]) state[name] = $(name).value;
    fillFilters();
    draw();
    writeAddress();
  });
  $("jump").addEventListener("input", () => move(Number($("jump").value) - at));
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  addEventListener("hashchange", readAddress);
  addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea, .scroll")) return; // there the arrows have work of their own
    const box = $("problems").parentElement.getBoundingClientRect();
    if (box.top > innerHeight || box.bottom < 0) return; // nobody would see what changes
    event.preventDefault();
    move(by);
  });
}

if (data.problems.length) start();
