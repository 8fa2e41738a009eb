// Elements from data: text is only ever set as text, so that nothing in a caption or a name becomes markup.

export const $ = (id) => document.getElementById(id);

/** An element. attributes: names as in HTML, `on<event>` for handlers, true for empty ones; children: elements or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  fill(element, ...children);
  return element;
}

/** Make these the children of an element; null and undefined are left out. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(2).filter((child) => child !== null && child !== undefined));
}

/** Draw something anew; the keyboard stays on the element that has the same `data-key` afterwards. */
export function keepFocus(draw) {
  const key = document.activeElement?.dataset.key;
  draw();
  if (key && document.activeElement?.dataset.key !== key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

/** The same as `h` for SVG. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

export const count = (n) => n.toLocaleString("en-US");
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
export const chip = (decision, ...more) => h("span", { class: `chip ${decision ?? ""}` }, decision ?? "undecided", ...more);

/** A number as short as it can be said with about four significant digits. */
export function number(value) {
  if (value === null || value === undefined) return "none";
  if (Number.isInteger(value)) return count(value).replace("-", "−");
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return (size > 0 && size < 0.0005 ? value.toExponential(1) : value.toFixed(digits)).replace("-", "−");
}

let hiding = 0;

/** Say something that went wrong (or right) for a few seconds. */
export function say(text) {
  const toast = $("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { toast.hidden = true; }, 6000);
}
