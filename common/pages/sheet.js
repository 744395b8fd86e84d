"use strict";
// A sheet to be filled in: one row at a time, answers kept in the browser, saved as the CSV that the scorer reads.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const columns = data.questions.map((question) => question.column);
const store = `sheet ${data.sheet}`;
let answers = {}; // {row: {column: label, comment: text}}
let at = 0;
let keeps = true; // whether the browser still stores answers

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- answers ----
const answersOf = (row) => answers[row.row] || {};
const done = (row) => columns.every((column) => answersOf(row)[column]);
const place = () => { // in the browser's store; null where it has none
  try {
    return window.localStorage;
  } catch {
    return null;
  }
};

function stored() {
  try {
    return JSON.parse(place().getItem(store)) || {};
  } catch {
    return {};
  }
}

function refresh() { // what another tab has answered meanwhile is answered here too
  if (keeps) answers = { ...answers, ...stored() };
}

function keep(change) {
  $("said").textContent = ""; // what was said of a saved table is no longer true
  refresh();
  const row = data.rows[at];
  answers[row.row] = { ...answersOf(row), ...change };
  try {
    place().setItem(store, JSON.stringify(answers));
  } catch {
    keeps = false;
    $("said").textContent = "This browser keeps nothing: save the table before you close the page.";
  }
}

function answer(column, label) {
  keep({ [column]: label });
  draw();
}

// ---- one row ----
function draw() {
  const row = data.rows[at];
  const cells = data.shown.map(([column, title]) => {
    const text = row[column].replace(/^'(?=[=+\-@\t])/, ""); // the quote is for spreadsheets alone
    return make("section", { class: "panel" }, make("h2", {}, title), make("pre", {}, text));
  });
  const last = cells.splice(cells.length - data.side_by_side);
  $("texts").replaceChildren(...cells, make("div", { class: "cards" }, ...last));
  for (const column of columns) {
    for (const input of document.getElementsByName(column)) input.checked = answersOf(row)[column] === input.value;
  }
  $("comment").value = answersOf(row).comment || "";
  const n = data.rows.filter(done).length;
  $("place").textContent = `row ${at + 1} of ${data.rows.length}, ${n} answered`;
}

function go(to) {
  at = (to + data.rows.length) % data.rows.length;
  draw();
  const bar = document.querySelector(".move").getBoundingClientRect(); // it stays at the top, over what scrolls
  if ($("texts").getBoundingClientRect().top < bar.bottom) $("texts").scrollIntoView();
  location.replace(`#row=${data.rows[at].row}`);
}

function goOpen() {
  const order = [...data.rows.keys()].map((i) => (at + 1 + i) % data.rows.length);
  const open = order.find((i) => !done(data.rows[i]));
  if (open === undefined) $("said").textContent = "Every row is answered: save the table.";
  else go(open);
}

function readAddress() {
  const wanted = location.hash.replace("#row=", "");
  const i = data.rows.findIndex((row) => row.row === wanted);
  if (i >= 0 && i !== at) {
    at = i;
    draw();
  }
}

// ---- the table ----
const quoted = (cell) => `"${cell.replaceAll('"', '""')}"`;
const noFormula = (text) => text.replace(/^(?=[=+\-@\t])/, "'");

function table() {
  const locked = ["sheet", "row", ...data.shown.map(([column]) => column)];
  const lines = data.rows.map((row) => [
    data.sheet, ...locked.slice(1).map((column) => row[column]),
    ...columns.map((column) => answersOf(row)[column] || ""), noFormula(answersOf(row).comment || ""),
  ]);
  return [data.head, ...lines].map((cells) => `${cells.map(quoted).join(",")}\r\n`).join("");
}

function save() {
  refresh();
  draw();
  const address = URL.createObjectURL(new Blob(["\ufeff", table()], { type: "text/csv" }));
  make("a", { href: address, download: data.file }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  const open = data.rows.filter((row) => !done(row)).length;
  $("said").textContent = open ? `Saved ${data.file}; ${open} rows have no answer yet.` : `Saved ${data.file}, complete.`;
}

// ---- keys ----
function pressed(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("textarea")) return;
  if (event.repeat && event.key.length === 1) return; // a key that is held answers one row
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && !event.target.closest("input[type=radio]")) { // there the arrows choose
    event.preventDefault();
    go(at + by);
  }
  if (!$("keys").checked || event.key.length !== 1) return;
  const open = data.questions.filter((question) => !answersOf(data.rows[at])[question.column]);
  const question = open[0] || data.questions[0]; // the first open one; a single question may be answered anew
  if (!open.length && data.questions.length > 1) return;
  const label = question.labels.find((name) => name[0] === event.key.toLowerCase());
  if (!label) return;
  event.preventDefault();
  answer(question.column, label);
  if (open.length === 1 && at + 1 < data.rows.length) go(at + 1);
}

function start() {
  refresh();
  draw();
  readAddress();
  $("questions").addEventListener("submit", (event) => event.preventDefault());
  $("questions").addEventListener("change", (event) => {
    if (event.target.type === "radio") answer(event.target.name, event.target.value);
  });
  $("comment").addEventListener("input", () => keep({ comment: $("comment").value }));
  $("previous").addEventListener("click", () => go(at - 1));
  $("next").addEventListener("click", () => go(at + 1));
  $("open").addEventListener("click", goOpen);
  $("save").addEventListener("click", save);
  addEventListener("hashchange", readAddress);
  addEventListener("keydown", pressed);
  addEventListener("storage", () => {
    refresh();
    draw();
  });
}

start();
