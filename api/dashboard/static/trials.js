// The table of a search's trials: sorted, filtered and paged by the service, columns chosen here.
import { ask, byId, cell, counted, flops, keep, link, text } from "./common.js";

const table = byId("trials-table");
const { id, service } = byId("search").dataset;
const wanted = new URLSearchParams(location.search);
const NAMES = ["sort", "state", "text", "page"];
// the trial that the answer names
let best = null;
let hidden = new Set((wanted.get("hide") || "").split(",").filter(Boolean));

// the family with its main options: cores of a chain, experts of a mixture, an activation, heads
function shortName(name) {
  const experts = /experts=(\d+),active=(\d+)(?:,shared=(\d+))?(?:,granularity=(\d+))?/.exec(name);
  const mixed = experts ? ` ${experts[2]} of ${experts[1]}${experts[3] ? `, ${experts[3]} shared` : ""}${experts[4] ? `, 1/${experts[4]} of the hidden dimension` : ""}` : "";
  const cores = /cores=(\d+)/.exec(name);
  const many = cores ? ` ${cores[1]} cores` : "";
  const activation = /activation=(\w+)/.exec(name);
  const between = activation ? ` ${activation[1]}` : "";
  // without options, also those of parts in parentheses
  return name.replace(/@heads$/, "").replace(/:[^;()]*/g, "") + many + mixed + between + (name.endsWith("@heads") ? " @heads" : "");
}

// exponents of inputs · outputs · ranks; a chain of n factors has n(n+1)/2, n(n+1)/2 and n-1 of them
function exponents(theta) {
  const th = theta.map((v) => v.toFixed(2));
  for (let n = 2, axes = 3; n < 6; n += 1, axes = (n * (n + 1)) / 2) {
    if (th.length === 2 * axes + n - 1) {
      return [th.slice(0, axes), th.slice(axes, 2 * axes), th.slice(2 * axes)].map((p) => p.join(" ")).join(" · ");
    }
  }
  return "–";
}

function stateOf(t) {
  const state = document.createElement("span");
  state.className = `state ${t.state}`;
  state.textContent = t.reused_from === null ? t.state : `${t.state} (reused)`;
  return state;
}

function fill(row, t, seeds) {
  row.className = t.kind;
  if (t.id === best) row.classList.add("best");
  cell(row, link(`${service}/trials/${t.id}`, t.number), true);
  const kind = t.kind === "candidate" ? "" : ` (${t.kind})`;
  cell(row, shortName(t.name) + kind + (seeds > 1 ? `, seed ${t.seed}` : "")).title = t.name;
  const shown = cell(row, exponents(t.theta));
  shown.classList.add("mono", "exponents");
  shown.title = t.design;
  const state = cell(row, stateOf(t));
  if (t.error) {
    const why = document.createElement("small");
    why.className = "why";
    why.textContent = t.error;
    state.append(why);
  }
  // what a run has cost that never reached its end
  const partly = ["stopped", "paused"].includes(t.state) && t.trained_steps < t.steps;
  const steps = t.steps.toLocaleString("en");
  cell(row, t.loss === null ? "–" : t.loss.toFixed(4), true);
  cell(row, t.width, true);
  cell(row, partly ? `${t.trained_steps.toLocaleString("en")} of ${steps}` : steps, true);
  cell(row, flops(partly ? t.trained_flops : t.train_flops), true);
  cell(row, t.params.toLocaleString("en"), true);
  cell(row, t.seconds_per_step === null ? "–" : (1e3 * t.seconds_per_step).toPrecision(3), true);
}

function hide() {
  for (const row of table.rows) {
    [...row.cells].forEach((c, i) => { c.hidden = hidden.has(table.tHead.rows[0].cells[i].dataset.column); });
  }
}

// what was shown last, by trial, and the newest event before it: only trials that changed come again
let known = { last: null, trials: new Map() };

export async function refreshTrials(chosen = best) {
  best = chosen;
  const asked = new URLSearchParams(NAMES.filter((n) => wanted.get(n)).map((n) => [n, wanted.get(n)]));
  const before = known;
  if (before.last !== null) asked.set("since", before.last);
  const response = await ask(service, `/searches/${id}/rows?${asked}`);
  const found = await response.json();
  if (!response.ok) { text("more", found.detail); return; }
  const came = new Map(found.trials.map((t) => [t.id, t]));
  const trials = found.order.map((i) => came.get(i) || before.trials.get(i));
  known = { last: found.last, trials: new Map(trials.filter(Boolean).map((t) => [t.id, t])) };
  if (!trials.every(Boolean)) {
    known.last = null;
    await refreshTrials();
    return;
  }
  const seeds = new Set(trials.map((t) => t.seed)).size;
  const body = document.createElement("tbody");
  body.id = "trials";
  for (const t of trials) fill(body.insertRow(), t, seeds);
  byId("trials").replaceWith(body);
  const page = Number(wanted.get("page") || 1);
  const filtered = wanted.get("state") || wanted.get("text");
  text("more", !found.total ? (filtered ? "No trial matches these filters." : "No trial yet.")
    : `${counted(found.total, "trial")}${filtered ? " that match" : ""}; page ${page} of ${found.pages}.`);
  byId("newer").hidden = page <= 1;
  byId("older").hidden = page >= found.pages;
  const sort = wanted.get("sort") || "number";
  for (const th of table.tHead.rows[0].cells) {
    const by = th.dataset.sort;
    th.ariaSort = by && sort === by ? "ascending" : by && sort === `-${by}` ? "descending" : null;
  }
  hide();
}

function change(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value) wanted.set(name, value);
    else wanted.delete(name);
  }
  keep(changes);
  known.last = null;
  return refreshTrials();
}

for (const button of table.tHead.querySelectorAll("button")) {
  const by = button.closest("th").dataset.sort;
  button.addEventListener("click", () => change({ sort: (wanted.get("sort") || "number") === by ? `-${by}` : by, page: "" }));
}
const filters = byId("filter").elements;
filters.state.value = wanted.get("state") || "";
filters.text.value = wanted.get("text") || "";
byId("filter").addEventListener("submit", (event) => event.preventDefault());
filters.state.addEventListener("change", () => change({ state: filters.state.value, page: "" }));
let typing;
filters.text.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => change({ text: filters.text.value.trim(), page: "" }), 250);
});
byId("newer").addEventListener("click", () => change({ page: String(Number(wanted.get("page") || 1) - 1) }));
byId("older").addEventListener("click", () => change({ page: String(Number(wanted.get("page") || 1) + 1) }));
for (const box of byId("columns").querySelectorAll("input")) {
  box.checked = !hidden.has(box.name);
  box.addEventListener("change", () => {
    hidden = new Set([...byId("columns").querySelectorAll("input:not(:checked)")].map((b) => b.name));
    keep({ hide: [...hidden].join(",") });
    hide();
  });
}
