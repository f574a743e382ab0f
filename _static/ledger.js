// Filters the claims table by part, verdict and text. Without this script the page shows the whole table.
// Contract: table.ledger, whose body rows carry data-part and data-verdict, and an id each.
"use strict";

function distinct(rows, key) {
  return [...new Set(rows.map((row) => row.dataset[key]).filter(Boolean))];
}

function field(text, control) {
  const label = document.createElement("label");
  label.append(text, control);
  return label;
}

function chooser(text, values) {
  const select = document.createElement("select");
  select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
  return { select, label: field(text, select) };
}

function addFilter(table) {
  const rows = [...table.querySelectorAll("tbody tr[data-verdict]")];
  if (!rows.length) return;
  const part = chooser("Part", distinct(rows, "part"));
  const verdict = chooser("Verdict", distinct(rows, "verdict").sort());
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "e.g. INT4" });
  const reset = Object.assign(document.createElement("button"), { type: "button", textContent: "Show all" });
  const count = document.createElement("output"); // announced by screen readers when it changes
  const form = Object.assign(document.createElement("form"), { className: "ledger-filter" });
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the claims");
  form.append(part.label, verdict.label, field("Text", search), reset, count);

  function apply() {
    const words = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden =
        (part.select.value && row.dataset.part !== part.select.value) ||
        (verdict.select.value && row.dataset.verdict !== verdict.select.value) ||
        (words && !row.textContent.toLowerCase().includes(words));
      shown += !row.hidden;
    }
    count.value = `${shown} of ${rows.length} claims`;
  }

  // A link to a row has to lead to it, whatever is filtered out at the moment.
  function reveal() {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.hidden && rows.includes(row)) {
      form.reset();
      apply();
      row.scrollIntoView();
    }
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  reset.addEventListener("click", () => {
    form.reset();
    apply();
  });
  window.addEventListener("hashchange", reveal);
  table.before(form);
  apply();
}

function start() {
  document.querySelectorAll("table.ledger").forEach(addFilter);
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
