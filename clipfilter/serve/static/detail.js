// One picture, large, and why it was decided as it was.

import { $, chip, h, number, say } from "./dom.js";
import { label } from "./grid.js";
import { get, look, state, theRule } from "./state.js";

export async function openDetail(row) {
  let found;
  try {
    found = await get(`row/${row.position}`);
  } catch (error) {
    return say(error.message);
  }
  const dialog = $("detail");
  const clear = !state.blur || !found.decision || found.decision === "keep";
  const image = h("img", {
    src: `/api/picture/${row.position}?size=large${clear ? "&clear=1" : ""}`, alt: found.caption ?? found.key,
    onerror: (event) => event.target.replaceWith(h("p", { class: "nothing" }, "No picture can be shown.")),
  });
  const show = h("button", {
    type: "button",
    onclick: () => { image.src = `/api/picture/${row.position}?size=large&clear=1`; show.remove(); },
  }, "Show clearly");
  const { width, height, format, sha256 } = found.image;
  const facts = [
    ["Key", found.key], ["Shard", found.shard === "." ? null : found.shard], ["Row", found.row], ["uid", found.uid],
    ["Size", width ? `${width} × ${height} ${format ?? ""}` : null], ["Similarity to its caption", found.similarity === null ? null : number(found.similarity)],
    ["sha256", sha256],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  dialog.replaceChildren(
    h("div", { class: "detail-head" },
      h("h2", { id: "detail-title" }, found.decision ? chip(found.decision) : "", " ", h("bdi", {}, found.caption ?? found.key)),
      h("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "×")),
    h("div", { class: "detail-body" },
      h("div", { class: "detail-picture" },
        found.escalated ? h("p", { class: "nothing" }, "Escalated: this picture is never shown.") : image,
        h("div", { class: "buttons" }, found.escalated || clear ? null : show,
          theRule()?.labels ? [
            h("button", { type: "button", onclick: () => { dialog.close(); label(0); } }, h("kbd", {}, "k"), " Let it pass"),
            h("button", { type: "button", onclick: () => { dialog.close(); label(1); } }, h("kbd", {}, "r"), " Right to stop"),
          ] : null,
          h("button", { type: "button", onclick: () => { dialog.close(); look({ like: row.position, text: "", image: "", sort: "" }); } }, "Find similar"))),
      h("div", {},
        found.rules.length ? h("h3", {}, "Why") : null,
        h("ul", { class: "verdicts" }, found.rules.map((rule) => h("li", {},
          h("p", {}, chip(rule.result), " ", h("b", {}, rule.id)),
          h("p", { class: "note" }, rule.sentence + (rule.uncalibrated ? " (not calibrated for this model)" : ""))))),
        h("dl", { class: "facts-list" }, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, h("bdi", {}, String(value)))])))),
  );
  if (!dialog.open) dialog.showModal();
}

export function startDetail() {
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
}
