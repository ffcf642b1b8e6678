// What is known about one answer and one item: the way of the items, the milliseconds, scores, tokens.

import { count, h, ms, plural, score, show, signed } from "./dom.js";

const STAGES = ["store", "retrieve", "features", "user", "candidates"];
const SAYS = {
  store: "history and user row from the store",
  retrieve: "search in the catalogue",
  features: "rows to ids",
  user: "the user's side of the model",
  candidates: "the candidates' side of the model",
  rest: "checks, queueing, JSON",
};

// [[name, number]]: how many items were there at each step.
export function funnel(place, { answer, model, shown }) {
  const steps = [];
  const step = (n, says, minus = false) =>
    steps.push(
      h(
        "li",
        { class: minus ? "minus" : "" },
        h("b", { text: n === null ? "" : `${minus ? "−" : ""}${count(n)}` }),
        h("span", { text: says }),
      ),
    );
  if (model?.items) step(model.items, "in the catalogue");
  const popular = answer.source === "popularity";
  for (const [why, n] of Object.entries(answer.removed ?? {}))
    if (n) step(n, why === "seen" ? "seen before" : `${why} list`, true);
  if (answer.retrieved?.length)
    step(answer.retrieved.length, popular ? "most popular" : `retrieved${answer.source ? ` by ${answer.source}` : ""}`);
  else if (popular) step(null, "the most popular");
  if (Number.isInteger(answer.candidates)) step(answer.candidates, `ranked by ${answer.model}`);
  step(shown, Number.isInteger(answer.candidates) ? "shown" : `ranked by ${answer.model} and shown`);
  place.replaceChildren(...steps);
}

function stages(timing) {
  const { total, ...parts } = timing;
  const order = (name) => (STAGES.includes(name) ? STAGES.indexOf(name) : STAGES.length);
  const known = Object.entries(parts)
    .filter(([, value]) => Number.isFinite(value))
    .sort(([a], [b]) => order(a) - order(b));
  const sum = known.reduce((all, [, value]) => all + value, 0);
  const whole = Math.max(total ?? sum, sum);
  const rest = whole - sum;
  return { whole, parts: rest > 0.005 ? [...known, ["rest", rest]] : known };
}

const spoken = (name, whole, parts) =>
  `${name}: ${ms(whole)} ms: ${parts.map(([stage, value]) => `${stage} ${ms(value)}`).join(", ")}`;

// answers: [{name, tag, timing}]; all bars have one scale.
export function timing(place, answers) {
  const all = answers.filter(({ timing: one }) => one).map((one) => ({ ...one, ...stages(one.timing) }));
  const widest = Math.max(...all.map(({ whole }) => whole), 1e-9);
  place.replaceChildren(
    ...all.map(({ tag, name, whole, parts }) =>
      h(
        "div",
        { class: "time" },
        all.length > 1 && h("span", { class: `tag ${tag}`, text: tag.toUpperCase(), title: name }),
        h(
          "div",
          {
            class: "stack",
            role: "img",
            "aria-label": spoken(name, whole, parts),
            css: { "--whole": whole / widest },
          },
          ...parts.map(([stage, value]) =>
            h("span", {
              class: `stage ${stage}`,
              css: { "--share": value / whole },
              title: `${stage}: ${ms(value)} ms, ${SAYS[stage] ?? ""}`,
            }),
          ),
        ),
        h("b", { class: "total", text: `${ms(whole)} ms` }),
        h(
          "ul",
          { class: "legend" },
          ...parts.map(([stage, value]) =>
            h(
              "li",
              { title: SAYS[stage] },
              h("i", { class: `stage ${stage}` }),
              `${stage} `,
              h("b", { text: ms(value) }),
            ),
          ),
        ),
      ),
    ),
  );
}

export function badges(place, answer) {
  const marks = [];
  const mark = (text, says, kind = "") => marks.push(h("span", { class: `pill ${kind}`, text, title: says }));
  if (answer?.cold) mark("cold", "The service knows nothing of this user: no history, no row", "warn");
  if (answer?.stale) mark("stale", "The store does not answer: this is the last known history", "warn");
  if (answer?.clock_behind)
    mark("time moved", "The request's time was before the user's last event, whose time was taken", "warn");
  if (answer?.source === "popularity") mark("popularity list", "No retrieval for this user or in this service", "warn");
  if (answer?.bucket !== undefined && answer?.bucket !== null)
    mark(`bucket ${answer.bucket}`, "Where the hash of this user falls in the A/B test");
  if (answer?.unknown_items?.length)
    mark(`${plural(answer.unknown_items.length, "unknown item")}`, answer.unknown_items.map(show).join(", "), "warn");
  if (answer?.defaults?.length)
    mark(`${plural(answer.defaults.length, "column")} by default`, `Nobody gave: ${answer.defaults.join(", ")}`);
  place.replaceChildren(...marks);
}

export function columns(place, values) {
  const given = Object.entries(values ?? {});
  place.replaceChildren(
    ...given.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: show(value) }))),
  );
}

// one: {tag, model, row {score, scores}, place (0: not shown), of, retrieved, popular,
// tokens [{token, effect}], reason, error, compare}
export function itemOf(one) {
  const { row, tag, model, compare, place, of } = one;
  const block = h("section", { class: "of-model" });
  if (compare) block.append(h("h3", {}, h("span", { class: `tag ${tag}`, text: tag.toUpperCase() }), ` ${model}`));
  const facts = [
    ["place", place ? `${place} of ${of}` : `not in the ${of}`],
    ["fused score", score(row?.score)],
  ];
  if (one.retrieved) facts.push([one.popular ? "popular at" : "retrieved at", count(one.retrieved.place)]);
  if (Number.isFinite(one.retrieved?.similarity)) facts.push(["similarity", score(one.retrieved.similarity)]);
  const tasks = Object.entries(row?.scores ?? {});
  block.append(
    h(
      "dl",
      { class: "facts" },
      ...facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))),
    ),
    h(
      "ul",
      { class: "tasks", "aria-label": "Scores of the tasks" },
      ...tasks.map(([task, p], i) =>
        h(
          "li",
          {},
          h("span", { text: task }),
          h("span", { class: `bar task-${i % 6}`, css: { "--share": p } }),
          h("b", { text: score(p) }),
        ),
      ),
    ),
    tokens(one),
  );
  return block;
}

const MOST = 16;

function tokens({ tokens: found, error, reason, model }) {
  const block = h("div", { class: "tokens" }, h("h4", { text: "Which tokens carried the score" }));
  const hint = (text) => block.append(h("p", { class: "hint", text }));
  if (error) return (hint(error), block);
  if (!found) return (hint("Leaving out one token at a time …"), block);
  if (!found.length) return (hint(reason || `${model} has no tokens that can be left out one at a time.`), block);
  const sorted = [...found].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  const most = Math.abs(sorted[0].effect) || 1;
  const low = Math.min(0, ...found.map(({ effect }) => effect)) / most;
  const high = Math.max(0, ...found.map(({ effect }) => effect)) / most;
  const at = (effect) => (effect / most - low) / (high - low || 1);
  const bar = (effect) =>
    h(
      "span",
      { class: "track" },
      h("span", {
        class: `fill ${effect < 0 ? "less" : "more"}`,
        css: { "--from": Math.min(at(effect), at(0)), "--size": Math.abs(at(effect) - at(0)) },
      }),
    );
  const cut = sorted.length > MOST ? ` The ${MOST} largest of ${sorted.length}.` : "";
  block.append(
    h(
      "ol",
      { class: "ablation", css: { "--zero": at(0) } },
      ...sorted
        .slice(0, MOST)
        .map(({ token, effect }) =>
          h(
            "li",
            {},
            h("span", { class: "token", text: token, title: token }),
            h("b", { text: signed(effect) }),
            bar(effect),
          ),
        ),
    ),
    h("p", {
      class: "hint",
      text: `The fused score minus the score without this token.${cut}`,
    }),
  );
  return block;
}
