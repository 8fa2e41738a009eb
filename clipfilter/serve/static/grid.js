// The pictures of one page, the keys that move and label, and the pager.

import { $, chip, count, fill, h, number, plural, say } from "./dom.js";
import { openDetail } from "./detail.js";
import { look, onView, post, searching, state, theRule } from "./state.js";
import { drawLabels } from "./labels.js";

let rows = [];
let total = 0;
let here = 0;
let asked = 0;

export const rowAt = (index) => rows[index];

/** Load the page that `state.view` asks for. focus: which card to focus afterwards ("first", "last" or null). */
export async function load(focus = null) {
  const mine = ++asked;
  $("grid").setAttribute("aria-busy", "true");
  $("where-problem").textContent = "";
  try {
    const found = await post("rows", state.view);
    if (mine !== asked) return;
    ({ rows, total } = found);
    here = focus === "last" ? rows.length - 1 : 0;
    draw();
    if (focus) focusCard(here);
  } catch (error) {
    if (mine !== asked) return;
    if (state.view.where) $("where-problem").textContent = error.message;
    else say(error.message);
  } finally {
    if (mine === asked) $("grid").removeAttribute("aria-busy");
  }
}

function draw() {
  $("grid").replaceChildren(...rows.map(card));
  const { offset, limit } = state.view;
  const last = offset + rows.length;
  const most = searching() && total >= state.about.most_found ? "The nearest " : "";
  $("count").textContent = total ? most + plural(total, "picture") : "No picture fits.";
  if (total > limit) $("count").textContent += `, ${count(offset + 1)} to ${count(last)}`;
  const pages = Math.ceil(total / limit);
  const page = Math.floor(offset / limit);
  const to = (name, target, off) => h("button", { type: "button", disabled: off, onclick: () => turn(target, "first") }, name);
  const field = h("input", {
    type: "number", min: 1, max: Math.max(pages, 1), value: page + 1, "aria-label": `Page, of ${pages}`,
    onchange: (event) => turn(Math.min(Math.max(Math.round(+event.target.value) || 1, 1), pages) - 1, "first"),
  });
  $("pager").replaceChildren(...(pages > 1
    ? [to("Previous", page - 1, page === 0), h("span", {}, "Page ", field, ` of ${count(pages)}`), to("Next", page + 1, page >= pages - 1)]
    : []));
}

function turn(page, focus) {
  state.view.offset = page * state.view.limit;
  scrollTo({ top: 0 });
  return load(focus);
}

const hidden = (row) => row.escalated || (state.blur && row.decision && row.decision !== "keep");
export const picture = (row, size, clear) => `/api/picture/${row.position}?size=${size}${clear ? "&clear=1" : ""}`;

function card(row, index) {
  const rule = theRule();
  const name = row.caption ?? row.key;
  const says = [row.decision, name].filter(Boolean).join(": ");
  const item = h("li", { class: "card", tabindex: index === here ? 0 : -1, "aria-label": says, onfocus: () => { select(index); } });
  const frame = h("div", { class: "frame" });
  if (row.escalated) {
    frame.append(h("p", { class: "nothing" }, "Escalated: never shown"));
  } else {
    const image = h("img", {
      src: picture(row, "small", !hidden(row)), alt: "", loading: "lazy", decoding: "async", onerror: (event) => lost(event.target),
    });
    image.addEventListener("click", () => { focusCard(index); openDetail(row); });
    frame.append(image);
    if (hidden(row)) {
      frame.append(h("button", { type: "button", class: "reveal", tabindex: -1, onclick: () => reveal(index) }, "Show"));
    }
  }
  const badges = h("p", { class: "badges" });
  if (row.after) badges.append(chip(row.decision), h("span", { class: "arrow", "aria-label": "becomes" }, "→"), chip(row.after));
  else if (row.decision) badges.append(chip(row.decision));
  if (row.label !== null) badges.append(h("span", { class: `mark ${row.label ? "right" : "pass"}` }, row.label ? "r" : "k"));
  const value = row.cosine !== null ? `cosine ${number(row.cosine)}` : row.score !== null ? `${state.view.sort || rule?.id} ${number(row.score)}` : "";
  const why = row.reasons.map((reason) => (reason.band === "missing" ? `${reason.rule}: no score` : reason.rule)).join(", ");
  fill(item, frame, badges,
    h("p", { class: "value" }, value),
    h("p", { class: "caption" }, h("bdi", {}, name)),
    why ? h("p", { class: "why" }, why) : null,
  );
  return item;
}

function lost(image) {
  fetch(image.src).then((response) => response.text()).then((text) => {
    image.replaceWith(h("p", { class: "nothing" }, text.trim().slice(0, 120) || "No picture."));
  }, () => {});
}

/** Show one blurred picture clearly. */
function reveal(index) {
  const row = rows[index];
  if (!row || row.escalated) return;
  const item = $("grid").children[index];
  item.querySelector("img")?.setAttribute("src", picture(row, "small", true));
  item.querySelector(".reveal")?.remove();
}

function select(index) {
  if (index === here) return;
  $("grid").children[here]?.setAttribute("tabindex", "-1");
  here = index;
  $("grid").children[here]?.setAttribute("tabindex", "0");
}

export function focusCard(index) {
  select(index);
  $("grid").children[index]?.focus();
  $("grid").children[index]?.scrollIntoView({ block: "nearest" });
}

/** Move by some cards; past an end of the page, to the next one. */
async function step(by) {
  const target = here + by;
  if (target >= 0 && target < rows.length) return focusCard(target);
  const { offset, limit } = state.view;
  if (target < 0 && offset > 0) return turn(Math.floor(offset / limit) - 1, "last");
  if (target >= rows.length && offset + limit < total) return turn(Math.floor(offset / limit) + 1, "first");
  return focusCard(Math.min(Math.max(target, 0), rows.length - 1));
}

const columns = () => getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;

/** Label the focused picture: 1 (the rule is right to stop it), 0 (it should pass), or null (take back, or skip). */
export async function label(value) {
  const row = rows[here];
  const rule = theRule();
  if (!row || !rule?.labels) return say(rule ? `${rule.id} is a ${rule.kind} rule, whose threshold needs no labels.` : "There is no rule to label for.");
  if (value === null && row.label === null) return step(1);
  const index = here;
  try {
    const labels = await post("label", { position: row.position, rule: rule.id, label: value });
    row.label = value === null ? null : Boolean(value);
    state.about.labels[rule.id] = labels;
    drawLabels();
    const revealed = !$("grid").children[index]?.querySelector(".reveal");
    $("grid").children[index]?.replaceWith(card(row, index));
    if (revealed) reveal(index);
    if (value === null) focusCard(index);
    else await step(1);
  } catch (error) {
    say(error.message);
  }
}

const KEYS = {
  ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => step(columns()), ArrowUp: () => step(-columns()),
  k: () => label(0), r: () => label(1), x: () => label(null), v: () => reveal(here),
  Enter: () => rows[here] && openDetail(rows[here]),
};

export function startGrid() {
  onView(() => load());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    if ($("detail").open) {
      if (!"krx".includes(event.key)) return;
      $("detail").close();
    }
    const typing = event.target.closest?.("input, select, textarea, button, a");
    if (event.key === "/" && !event.target.closest?.("input, textarea")) {
      event.preventDefault();
      $("text").focus();
      return;
    }
    if (!(event.key in KEYS) || (typing && typing.isConnected && !typing.closest("dialog"))) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  $("blur").addEventListener("change", (event) => { state.blur = event.target.checked; draw(); });
}

/** What is filtered, each with a button to stop it. */
export function drawActive() {
  const { view } = state;
  const items = [];
  const item = (said, change) => items.push(h("li", {}, said, h("button", { type: "button", "aria-label": `Remove: ${said}`, onclick: () => look(change) }, "×")));
  if (view.text) item(`“${view.text}”`, { text: "" });
  if (view.image) item("like your picture", { image: "" });
  if (view.like >= 0) item("like a picture of the run", { like: -1 });
  if (view.flips) item("rows that change", { flips: false });
  if (view.labels === "sample") item(`random sample for ${view.label_rule}`, { labels: "" });
  if (view.labels === "labelled") item(`labelled for ${view.label_rule}`, { labels: "" });
  if (view.rule) item(`stopped by ${view.rule}${view.band ? ` (${view.band})` : ""}`, { rule: "", band: "" });
  if (view.where) item(view.where, { where: "" });
  $("active").replaceChildren(...items);
}
