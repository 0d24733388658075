// Try what is not chat: embeddings, rerank, tokenize.

import { json, post } from "./api.js";
import { complaint, count, field, h, mean, morph, options, s } from "./dom.js";
import { codeBlock } from "./markdown.js";
import { curl } from "./snippets.js";

const MOST_TEXTS = 40;

export function view(fleet) {
  const parts = [
    {
      title: "Embeddings",
      takes: "embeddings",
      path: "v1/embeddings",
      label: "Texts, one a line",
      text: "The cat sleeps on the sofa.\nA kitten naps on the couch.\nThe stock market fell today.",
      body(model, text) {
        const input = lines(text);
        if (input.length > MOST_TEXTS) throw new Error(`A picture of ${count(input.length)} texts cannot be read; try ${MOST_TEXTS} at most.`);
        return { model, input };
      },
      show: (answer, body) => matrix(answer.data.map((it) => it.embedding), body.input),
    },
    {
      title: "Rerank",
      takes: "rerank",
      path: "v1/rerank",
      label: "The question, then a document a line",
      text: "What is the capital of France?\nParis is the capital of France.\nBerlin lies on the Spree.",
      body: (model, text) => ({ model, query: lines(text)[0] ?? "", documents: lines(text).slice(1) }),
      show: (answer, body) => ranking(answer.results, body.documents),
    },
    {
      title: "Tokenize",
      takes: "",
      path: "tokenize",
      label: "Text",
      text: "Tokens are pieces of words.",
      body: (model, prompt) => ({ model, prompt, return_token_strs: true }),
      show: tokens,
    },
  ];
  return { element: h("div", { class: "cards wide" }, parts.map((part) => tried(part, fleet))), show() {} };
}

const lines = (text) => text.split("\n").map((it) => it.trim()).filter(Boolean);

function tried({ title, takes, path, label, text, body, show }, fleet) {
  const model = h("select");
  const written = h("textarea", { rows: "4" }, text);
  const button = h("button", { type: "submit", class: "primary" }, "Try");
  const result = h("div", { "aria-live": "polite" });
  const none = h("p", { class: "hint", hidden: true }, takes ? `No model here is known to take ${takes}.` : "There is no model here yet, or none that this key may use.");
  const form = h("form", {}, field("Model", model), field(label, written), h("div", { class: "row" }, button));

  fleet.listen(() => {
    const names = fleet.thatTake(takes);
    options(model, names, undefined, (id) => fleet.label(id));
    form.hidden = !names.length;
    none.hidden = names.length > 0;
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    mean(model);
    try {
      const sent = body(model.value, written.value);
      const answer = await json(await post(path, sent));
      const code = h("details", {}, h("summary", {}, "As code"), codeBlock(curl(path, sent), "curl"));
      morph(result, show(answer, sent), code);
    } catch (error) {
      morph(result, complaint(error));
    }
    button.disabled = false;
  });
  return h("section", { class: "card", "aria-label": title }, h("h2", {}, title), none, form, result);
}

/** The cosine of each pair, as a picture; the numbers stand in it. */
function matrix(vectors, texts) {
  const norm = (a) => Math.sqrt(dot(a, a)) || 1;
  const cosine = (a, b) => dot(a, b) / (norm(a) * norm(b));
  const size = vectors.length;
  const cell = 48;
  const cells = vectors.flatMap((a, row) =>
    vectors.map((b, column) => {
      const alike = cosine(a, b);
      return s(
        "g",
        {},
        s("title", {}, `${texts[row]} / ${texts[column]}: ${alike.toFixed(3)}`),
        s("rect", { x: column * cell, y: row * cell, width: cell - 2, height: cell - 2, rx: 6, "fill-opacity": Math.max(0.04, alike).toFixed(3) }),
        s("text", { x: column * cell + cell / 2 - 1, y: row * cell + cell / 2 + 4, "text-anchor": "middle", class: alike > 0.6 ? "on-colour" : "" }, alike.toFixed(2)),
      );
    }),
  );
  return h(
    "div",
    { class: "matrix" },
    s("svg", { viewBox: `0 0 ${size * cell} ${size * cell}`, width: size * cell, role: "img", "aria-label": `Cosine similarity of ${size} texts` }, cells),
    h("ol", {}, texts.map((it) => h("li", {}, it))),
    h("p", { class: "hint" }, `Cosine similarity of vectors of ${count(vectors[0]?.length ?? 0)} numbers.`),
  );
}

const dot = (a, b) => a.reduce((total, it, n) => total + it * b[n], 0);

function ranking(results, documents) {
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Score"), h("th", { scope: "col" }, "Document"))),
    h("tbody", {}, results.map((it) =>
      h("tr", {}, h("td", { class: "number" }, it.relevance_score.toFixed(3)), h("td", {}, it.document?.text ?? documents[it.index])))),
  );
}

/** Tokenizers write a space as "Ġ" or "▁" and a line's end as "Ċ". */
const readable = (token) => token.replace(/[Ġ▁]/g, " ").replace(/Ċ/g, "⏎");

function tokens({ count: number, max_model_len: longest, tokens: ids, token_strs: texts }) {
  return h(
    "div",
    {},
    h("p", { class: "tokens" }, ids.map((id, n) => h("span", { class: `token-${n % 5}`, title: `${id}` }, readable(texts?.[n] ?? `${id}`)))),
    h("p", { class: "hint" }, `${count(number)} tokens of at most ${count(longest)}.`),
  );
}
