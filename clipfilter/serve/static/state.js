// What the page is looking at, kept for this tab across reloads; and the questions it can ask the server.

const KEY = "clipfilter-view";
const EMPTY = {
  decision: "", rule: "", band: "", where: "", labels: "", label_rule: "", changes: {}, flips: false,
  text: "", image: "", like: -1, sort: "", descending: false, offset: 0, limit: 60,
};

/** about: the run; view: the request for rows; blur: whether pictures that were not kept are blurred. */
export const state = { about: null, view: { ...EMPTY }, blur: true, effect: null };

export function restore(about) {
  state.about = about;
  try {
    const saved = JSON.parse(sessionStorage.getItem(KEY) ?? "{}");
    if (saved.run === `${about.run} ${about.version}`) Object.assign(state.view, saved.view, { image: "" });
  } catch { /* an older page's state */ }
  if (!about.rules.some((rule) => rule.id === state.view.label_rule)) {
    state.view.label_rule = (about.rules.find((rule) => rule.labels) ?? about.rules[0])?.id ?? "";
  }
}

function save() {
  const { run, version } = state.about;
  sessionStorage.setItem(KEY, JSON.stringify({ run: `${run} ${version}`, view: state.view }));
}

const watchers = [];
export const onView = (watcher) => watchers.push(watcher);

/** Change what is looked at; back to the first page unless an offset is given. */
export function look(change) {
  Object.assign(state.view, { offset: 0 }, change);
  save();
  for (const watcher of watchers) watcher();
}

/** Remember moved thresholds without loading rows again. */
export function move(changes) {
  state.view.changes = changes;
  save();
}

export const theRule = () => state.about.rules.find((rule) => rule.id === state.view.label_rule);
export const searching = () => Boolean(state.view.text || state.view.image || state.view.like >= 0);

async function answer(response) {
  const text = await response.text();
  let data;
  try { data = JSON.parse(text); } catch { throw new Error(text.trim() || response.statusText); }
  if (!response.ok) throw new Error(data.error ?? response.statusText);
  return data;
}

async function reach(url, options) {
  try {
    return await fetch(url, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("The server does not answer; is clipfilter serve still running?");
  }
}

export const get = async (path) => answer(await reach(`/api/${path}`, {}));
export const post = async (path, data) => answer(await reach(`/api/${path}`, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(data),
}));
