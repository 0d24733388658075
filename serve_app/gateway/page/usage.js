// Who used what: /v1/usage as a table, and as CSV.

import { get, json } from "./api.js";
import { complaint, count, field, h, morph } from "./dom.js";

const GROUPS = ["key", "model", "day"];
const NUMBERS = ["requests", "refused", "unreported", "prompt_tokens", "cached_tokens", "completion_tokens"];

export function view() {
  const day = (daysAgo) => new Date(Date.now() - daysAgo * 86_400_000).toISOString().slice(0, 10);
  const from = h("input", { type: "date", value: day(29), change: load });
  const to = h("input", { type: "date", value: day(0), change: load });
  const by = GROUPS.map((name) => h("input", { type: "checkbox", checked: true, value: name, change: load }));
  const save = h("button", { type: "button", disabled: true, click: () => download(rows, groups()) }, "Save as CSV");
  const result = h("div", { "aria-live": "polite" });
  const groups = () => by.filter((it) => it.checked).map((it) => it.value);
  let rows = [];
  let asked = 0; // of several on their way the last one counts

  async function load() {
    const turn = ++asked;
    let next = [];
    let said;
    const query = new URLSearchParams({ from: from.value, to: to.value, group_by: groups().join(",") });
    for (const name of ["from", "to"]) if (!query.get(name)) query.delete(name);
    try {
      next = (await json(await get(`v1/usage?${query}`))).data;
      said = next.length ? table(next, groups()) : h("p", { class: "hint" }, "Nothing was used in these days.");
    } catch (error) {
      said = complaint(error);
    }
    if (turn !== asked) return;
    draw(next, said);
  }

  function draw(next, said) {
    rows = next;
    morph(result, said);
    save.disabled = !rows.length;
  }

  return {
    element: h(
      "div",
      {},
      h(
        "div",
        { class: "toolbar" },
        field("From", from),
        field("To", to),
        h("fieldset", { class: "checks" }, h("legend", {}, "By"), by.map((it) => h("label", {}, it, ` ${it.value}`))),
        save,
      ),
      result,
    ),
    show: load,
    keyChanged() {
      asked += 1;
      draw([], null);
    },
  };
}

const title = (name) => name.replaceAll("_", " ").replace(/^./, (it) => it.toUpperCase());

function table(rows, groups) {
  const total = (name) => rows.reduce((all, row) => all + row[name], 0);
  const number = (value) => h("td", { class: "number" }, count(value));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Usage" },
    h(
      "table",
      { class: "usage" },
      h("thead", {}, h("tr", {},
        groups.map((it) => h("th", { scope: "col" }, title(it))),
        NUMBERS.map((it) => h("th", { scope: "col", class: "number" }, title(it))))),
      h("tbody", {}, rows.map((row) =>
        h("tr", {}, groups.map((it) => h("td", {}, row[it] || "–")), NUMBERS.map((it) => number(row[it]))))),
      groups.length > 0 && h("tfoot", {}, h("tr", {},
        h("th", { scope: "row", colspan: groups.length }, "All"), NUMBERS.map((it) => number(total(it))))),
    ),
  );
}

/** The rows as CSV. A spreadsheet would run a cell that begins like a formula: a quote goes before. */
export function csv(rows, groups) {
  const columns = [...groups, ...NUMBERS];
  const cell = (value) => {
    let text = String(value ?? "");
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows.map((row) => columns.map((it) => row[it]))].map((row) => row.map(cell).join(",") + "\r\n").join("");
}

function download(rows, groups) {
  const url = URL.createObjectURL(new Blob([csv(rows, groups)], { type: "text/csv" }));
  h("a", { href: url, download: "usage.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
