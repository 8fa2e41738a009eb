// Starts the page: the run's facts, the search, the filters.

import { $, chip, count, h, keepFocus, say } from "./dom.js";
import { startDetail } from "./detail.js";
import { drawActive, load, startGrid } from "./grid.js";
import { drawLabels } from "./labels.js";
import { drawRule, startRules } from "./rules.js";
import { get, look, onView, post, restore, searching, state } from "./state.js";

const MOST_BYTES = 20 << 20;

/** All, keep, review and reject with their counts, as they are and as moved thresholds would make them. */
export function drawDecisions() {
  const { about, view, effect } = state;
  if (!about.policy) return;
  const choice = (value, name, n, after) => h("button", {
    type: "button", class: `decision ${value}`, "data-key": `decision ${value}`, "aria-pressed": String(view.decision === value), onclick: () => look({ decision: value }),
  }, h("span", { class: `dot ${value || "plain"}` }), name, h("b", {}, count(n)),
  after !== undefined && after !== n ? h("span", { class: "after" }, `→ ${count(after)}`) : null);
  $("decisions").replaceChildren(
    choice("", "All", about.rows),
    ...["keep", "review", "reject"].map((name) => choice(name, name[0].toUpperCase() + name.slice(1), about.decisions[name], effect?.decisions[name])),
    h("span", { class: "note failed-note" }, about.failed ? `${count(about.failed)} failed, not shown` : ""));
}

function drawFilters() {
  const { about, view } = state;
  const fixed = searching();
  const option = (value, text) => h("option", { value }, text);
  const sorts = about.scores.flatMap((name) => [option(`${name} down`, `${name}, highest first`), option(`${name} up`, `${name}, lowest first`)]);
  $("sort").replaceChildren(option("", fixed ? "nearest first" : view.labels ? "as drawn" : "as in the run"), ...sorts);
  $("sort").value = view.sort ? `${view.sort} ${view.descending ? "down" : "up"}` : "";
  $("sort").disabled = fixed || Boolean(view.labels);
  const bands = about.rules.flatMap((rule) => [
    option(`${rule.id} `, rule.id),
    ...(Object.keys(rule.counts).length > 1 ? Object.keys(rule.counts).map((band) => option(`${rule.id} ${band}`, `${rule.id}, ${band}`)) : []),
  ]);
  $("stopped").replaceChildren(option("", "any rule or none"), ...bands);
  $("stopped").value = view.rule ? `${view.rule} ${view.band}` : "";
  $("where").value = view.where;
  $("text").value = view.text;
}

function drawAll() {
  drawDecisions();
  drawFilters();
  drawActive();
  if (state.about.rules.length) {
    $("rule").value = state.view.label_rule;
    drawRule();
    drawLabels();
  }
}

function startSearch() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    look({ text: $("text").value.trim(), labels: "" });
  });
  $("text").addEventListener("search", () => { if (!$("text").value && state.view.text) look({ text: "" }); });
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => { searchWith($("file").files[0]); $("file").value = ""; });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => { event.preventDefault(); searchWith(event.dataTransfer.files[0]); });
  $("where-form").addEventListener("submit", (event) => { event.preventDefault(); look({ where: $("where").value.trim() }); });
  $("where").addEventListener("change", () => look({ where: $("where").value.trim() }));
  $("sort").addEventListener("change", () => {
    const [sort, order] = split($("sort").value);
    look({ sort, descending: order === "down" });
  });
  $("stopped").addEventListener("change", () => {
    const [rule, band] = split($("stopped").value);
    look({ rule, band });
  });
  $("keys").addEventListener("click", () => $("help").showModal());
}

function split(value) {
  const at = value.lastIndexOf(" ");
  return at < 0 ? ["", ""] : [value.slice(0, at), value.slice(at + 1)];
}

async function searchWith(file) {
  if (!file) return;
  if (file.size > MOST_BYTES) return say("That file is too large for a search (20 MB at most).");
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  try {
    const { image } = await post("image", { data: btoa(text) });
    look({ image, like: -1, labels: "" });
  } catch (error) {
    say(error.message);
  }
}

async function start() {
  // The token was needed once; a cookie stands for it now, and the address bar need not show it.
  if (location.search) history.replaceState(null, "", "/");
  const about = await get("run");
  restore(about);
  document.title = `${about.name} · clipfilter`;
  $("name").textContent = about.name;
  $("kicker").textContent = [
    about.policy ? `Decided by ${about.policy.name}, version ${about.policy.version}` : "Nothing is decided", `model ${about.model}`, `dataset version ${about.version}`,
  ].join(" · ");
  $("side").hidden = !about.rules.length;
  $("side").open = matchMedia("(min-width: 981px)").matches;
  $("stopped-label").hidden = !about.rules.length;
  if (!about.policy) $("decisions").replaceChildren(chip(null), h("b", {}, count(about.rows)));
  startGrid();
  startSearch();
  startDetail();
  if (about.rules.length) await startRules();
  onView(() => keepFocus(drawAll));
  drawAll();
  await load();
}

start().catch((error) => { $("count").textContent = error.message; });
