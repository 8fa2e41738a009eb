// The labels of the chosen rule: how many, how they were picked, where they are written, and what to do with them.

import { $, count, fill, h, plural, say } from "./dom.js";
import { look, post, state, theRule } from "./state.js";

export function drawLabels() {
  const rule = theRule();
  const found = rule && state.about.labels[rule.id];
  $("label-panel").hidden = !found;
  if (!found) return;
  const { view } = state;
  const size = h("input", { type: "number", min: 10, max: 100000, value: 100, id: "sample-size", "aria-label": "Rows in the sample" });
  const start = h("button", { type: "button", onclick: () => sample(rule.id, Math.round(+size.value) || 100) }, found.sample ? "Draw more" : "Draw");
  const done = found.sample ? h("progress", { max: found.sample, value: found.sample_done, "aria-label": "Sample labelled" }) : null;
  const looking = (name, text, off) => h("button", {
    type: "button", "data-key": `look ${name}`, disabled: off, "aria-pressed": String(view.labels === name), onclick: () => look({ labels: view.labels === name ? "" : name, flips: false }),
  }, text);
  fill($("labels"),
    h("p", { class: "note" }, h("kbd", {}, "k"), " ", h("b", {}, rule.id), " should let it pass, ", h("kbd", {}, "r"), " is right to stop it, ",
      h("kbd", {}, "x"), " takes it back or skips."),
    h("p", {}, h("b", {}, plural(found.labelled, "label")), `, ${count(found.true)} to stop.`),
    h("h3", {}, "A random sample"),
    found.sample
      ? h("p", { class: "note" }, `${count(found.sample_done)} of ${count(found.sample)} labelled. Thresholds from it come with a guarantee; label it from the top.`)
      : h("p", { class: "note" }, "Pictures that you pick yourself only allow an estimate. Drawn at random, labels earn a guarantee."),
    done,
    h("div", { class: "buttons" },
      found.sample ? looking("sample", "Label the sample", false) : null,
      h("label", { class: "inline" }, size, "rows"), start,
      looking("labelled", "Labelled", !found.labelled)),
    h("details", {}, h("summary", {}, "Use the labels"),
      h("p", { class: "note" }, "Written at once to"), h("pre", { tabindex: 0 }, h("code", {}, found.file)),
      h("p", { class: "note" }, "Thresholds from them"), h("pre", { tabindex: 0 }, h("code", {}, found.command))),
  );
}

async function sample(rule, n) {
  try {
    const more = state.about.labels[rule].sample;
    state.about.labels[rule] = await post("sample", { rule, n: Math.max(n, more ? more + n : n) });
    look({ labels: "sample", flips: false, text: "", image: "", like: -1, decision: "", rule: "", band: "", where: "", sort: "" });
  } catch (error) {
    say(error.message);
  }
}
