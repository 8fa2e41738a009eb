// The chosen rule: histogram of its scores, thresholds to move, and what moving them changes.

import { $, chip, count, fill, h, keepFocus, number, plural, say, svg } from "./dom.js";
import { look, move, post, state, theRule } from "./state.js";
import { drawDecisions } from "./app.js";

const HEIGHT = 96;
const KINDS = { concept: "Concept", alignment: "Match of picture and caption", head: "Head", safety: "Safety check", pixels: "Pixel quality", text: "Caption text", known: "Known pictures", combine: "Weighted sum", metadata: "Metadata", fraction: "Best part" };
let busy = false;
let waiting = null;
let shown = "";

const values = (rule) => Object.fromEntries(rule.bands.map((band) => [band.name, state.view.changes[rule.id]?.[band.name] ?? band.value]));
const moved = () => Object.keys(state.view.changes).length > 0;

export function drawRule() {
  const rule = theRule();
  if (!rule) return;
  const origin = { calibrated: "calibrated for this model", dataset: "fixed over the dataset", written: rule.calibrated === false ? "not calibrated for this model" : "as written" };
  const from = [...new Set(rule.bands.map((band) => origin[band.source]))].join(", ");
  const stopped = Object.entries(rule.counts).map(([band, n]) => `${count(n)} ${band === "missing" ? "without a score" : band}`).join(", ");
  $("rule-note").textContent = `${KINDS[rule.kind] ?? rule.kind}${rule.of ? ` of ${rule.of}` : ""}, ${from || "without thresholds"}. Stops ${stopped || "nothing"}.`;
  drawHistogram(rule);
  if (shown !== rule.id) {  // not anew while somebody holds one
    shown = rule.id;
    fill($("sliders"), rule.fixed ? h("p", { class: "note" }, rule.fixed) : rule.bands.map((band) => slider(rule, band)));
  }
  drawEffect();
}

function drawHistogram(rule) {
  if (!rule.bars.length) return $("histogram").replaceChildren();
  const low = rule.edges[0];
  const high = rule.edges.at(-1);
  const x = (value) => `${Math.min(Math.max(100 * (value - low) / (high - low), 0), 100).toFixed(3)}%`;
  const limits = rule.bands.map((band) => ({ ...band, now: limit(rule, band) })).filter((band) => band.now !== null);
  const peak = Math.max(...rule.bars, 1);
  const squeezed = peak > 25 * median(rule.bars.filter((n) => n > 0));
  const tall = (n) => (squeezed ? Math.sqrt(n / peak) : n / peak) * HEIGHT;
  const chart = svg("svg", { class: "chart", width: "100%", height: HEIGHT + 20, role: "img", "aria-label": `Scores of ${rule.id}, ${number(rule.low)} to ${number(rule.high)}` });
  rule.bars.forEach((n, place) => {
    if (!n) return;
    const [start, stop] = [rule.edges[place], rule.edges[place + 1]];
    const cuts = [start, ...limits.map((band) => band.now).filter((at) => at > start && at < stop).sort((a, b) => a - b), stop];
    const height = Math.max(tall(n), 1.5);
    const group = svg("g", {}, Object.assign(svg("title"), { textContent: `${number(start)} to ${number(stop)}: ${plural(n, "picture")}` }));
    for (let part = 0; part + 1 < cuts.length; part++) {
      const width = 100 * (cuts[part + 1] - cuts[part]) / (high - low);
      group.append(svg("rect", { class: `bar ${zone((cuts[part] + cuts[part + 1]) / 2, limits)}`, x: x(cuts[part]), y: HEIGHT - height, width: `${width.toFixed(3)}%`, height }));
    }
    chart.append(group);
  });
  chart.append(svg("line", { class: "axis", x1: 0, x2: "100%", y1: HEIGHT, y2: HEIGHT }));
  for (const band of limits) {
    if (band.now !== band.threshold) chart.append(svg("line", { class: `was ${band.name}`, x1: x(band.threshold), x2: x(band.threshold), y1: 0, y2: HEIGHT }));
    chart.append(svg("line", { class: `limit ${band.name}`, x1: x(band.now), x2: x(band.now), y1: 0, y2: HEIGHT }));
  }
  for (const [at, anchor] of [[low, "start"], [(low + high) / 2, "middle"], [high, "end"]]) {
    chart.append(Object.assign(svg("text", { x: x(at), y: HEIGHT + 15, "text-anchor": anchor }), { textContent: number(at) }));
  }
  $("histogram").replaceChildren(chart);
}

/** The threshold of a band on the score axis: a fraction's is told by the server. */
function limit(rule, band) {
  if (rule.kind !== "fraction") return values(rule)[band.name];
  return state.effect?.thresholds?.[rule.id]?.[band.name] ?? band.threshold;
}

const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)] ?? 1;

function zone(value, limits) {
  const hit = limits.find((band) => (band.direction === "above" ? value > band.now : value < band.now));
  return hit ? hit.name : "keep";
}

function slider(rule, band) {
  const ranked = rule.kind === "fraction";
  const [low, high] = ranked ? [0, 1] : [rule.edges[0], rule.edges.at(-1)];
  const step = 10 ** Math.floor(Math.log10((high - low) / 400));
  const digits = Math.max(0, -Math.round(Math.log10(step)));
  const id = `slider-${band.name}`;
  const now = values(rule)[band.name];
  const field = h("input", { type: "number", class: "exact", step: "any", value: now, "aria-label": `${band.name} threshold` });
  const range = h("input", { type: "range", id, class: band.name, min: low, max: high, step: "any", value: now, "aria-valuetext": number(now) });
  const change = (value, final) => {
    if (!Number.isFinite(value)) return;
    range.value = value;
    if (document.activeElement !== field) field.value = value;
    range.setAttribute("aria-valuetext", number(value));
    const changes = { ...state.view.changes, [rule.id]: { ...state.view.changes[rule.id], [band.name]: value } };
    if (value === band.value) delete changes[rule.id][band.name];
    if (!Object.keys(changes[rule.id]).length) delete changes[rule.id];
    move(changes);
    drawHistogram(rule);
    ask(final);
  };
  const rounded = () => Number((+range.value).toFixed(digits));
  range.addEventListener("input", () => change(rounded(), false));
  range.addEventListener("change", () => change(rounded(), true));
  range.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -20, PageUp: 20 }[event.key];
    if (!by) return;
    event.preventDefault();
    change(Number(Math.min(Math.max(+range.value + by * step, low), high).toFixed(digits)), true);
  });
  field.addEventListener("change", () => change(+field.value, true));
  const says = ranked ? `${band.name}: best share that stays` : `${band.name} ${band.direction}`;
  return h("div", { class: `slider${ranked ? " ranked" : ""}` }, h("div", { class: "line" }, h("label", { for: id }, h("span", { class: `dot ${band.name}` }), says), field), range);
}

/** Ask for the effect; while one question is on its way, only the newest waits. */
async function ask(final) {
  waiting = final;
  if (busy) return;
  busy = true;
  while (waiting !== null) {
    const exact = waiting;
    waiting = null;
    try {
      state.effect = moved() ? await post("effect", { changes: state.view.changes, exact }) : null;
      state.effectProblem = null;
    } catch (error) {
      state.effect = null;
      state.effectProblem = error.message;
    }
    keepFocus(() => { drawEffect(); drawDecisions(); });
    if (theRule().kind === "fraction") drawHistogram(theRule());
    if (exact && waiting === null && !state.effectProblem) look({ flips: state.view.flips && moved() });
  }
  busy = false;
}

function drawEffect() {
  const target = $("effect");
  if (state.effectProblem) return target.replaceChildren(h("p", { class: "problem" }, state.effectProblem));
  if (!moved()) return target.replaceChildren(h("p", { class: "note" }, "Move a threshold to see which pictures change."));
  const found = state.effect;
  if (!found) return target.replaceChildren();
  const others = Object.keys(state.view.changes).filter((rule) => rule !== state.view.label_rule);
  fill(target,
    h("p", { class: "flips" }, h("b", { id: "flipped" }, count(found.flipped)), ` of ${plural(found.rows, "picture")} change`),
    h("ul", { class: "changes" }, found.changes.map((change) => h("li", {}, chip(change.from), h("span", { class: "arrow", "aria-label": "becomes" }, "→"), chip(change.to), h("b", {}, count(change.rows))))),
    found.doubtful ? h("p", { class: "note" }, `${plural(found.doubtful, "picture")} stand too close to tell while you move.`) : null,
    others.length ? h("p", { class: "note" }, `Moved too: ${others.join(", ")}.`) : null,
    h("div", { class: "buttons" },
      h("button", { type: "button", id: "show-flips", "data-key": "show-flips", "aria-pressed": String(state.view.flips), disabled: !found.flipped, onclick: () => look({ flips: !state.view.flips, labels: "" }) }, "Show them"),
      h("button", { type: "button", onclick: reset }, "Put back"),
      h("button", { type: "button", class: "primary", id: "export", onclick: save }, "Save policy")),
  );
}

function reset() {
  state.effect = null;
  state.effectProblem = null;
  shown = "";
  look({ changes: {}, flips: false });
}

async function save() {
  try {
    const { name, text } = await post("export", { changes: state.view.changes });
    const url = URL.createObjectURL(new Blob([text], { type: "application/yaml" }));
    h("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say(`${name} is among your downloads; decide with it: clipfilter filter RUN --policy ${name} --out OUT`);
  } catch (error) {
    say(error.message);
  }
}

/** After a reload: what the thresholds that were moved before still change. */
export async function startRules() {
  const chooser = $("rule");
  chooser.replaceChildren(...state.about.rules.map((rule) => h("option", { value: rule.id }, rule.id)));
  chooser.value = state.view.label_rule;
  chooser.addEventListener("change", () => look({ label_rule: chooser.value, labels: "" }));
  if (moved()) {
    try {
      state.effect = await post("effect", { changes: state.view.changes, exact: true });
    } catch {
      move({});
    }
  }
}
