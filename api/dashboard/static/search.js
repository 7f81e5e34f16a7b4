// The page of one search: listens to its events and redraws from one JSON document.
import { showBest, showLeftOut } from "./answer.js";
import { ask, byId, counted, flops, keep, text } from "./common.js";
import { draw, whole } from "./figure.js";
import { refreshTrials } from "./trials.js";

const root = byId("search");
const id = root.dataset.id;
// path below which the service is served; empty for most
const service = root.dataset.service;
const TERMINAL = ["succeeded", "failed", "cancelled"];
//: What is asked before something is destroyed.
const ASKED = {
  cancel: "Cancel this search? Its running trials end without a result.",
  delete: "Delete this search with its trials and its log? It has no completed run.",
};
//: Positions of the slider of budgets.
const STEPS = 200;

function showSearch(search, workers, canRetry) {
  byId("state").textContent = search.state;
  byId("state").className = `state ${search.state}`;
  const ended = TERMINAL.includes(search.state);
  const possible = {
    cancel: !ended,
    pause: ["queued", "running"].includes(search.state) && !search.pause_requested,
    resume: search.state === "paused" || search.pause_requested,
    retry: ended && canRetry,
    // results are never deleted
    delete: ended && !search.trial_counts.complete,
  };
  for (const button of document.querySelectorAll("button.act")) button.hidden = !possible[button.dataset.act];
  if (search.task_fingerprint) text("fingerprint", search.task_fingerprint);
  byId("error").hidden = !search.error;
  byId("error").textContent = search.error || "";
  const notice = search.limit_reached ? `Ended at its limit: ${search.limit_reached}.`
    : search.cancel_requested && !ended ? "Cancelling: waiting for the worker to stop its runs."
    : search.pause_requested ? "Pausing: waiting for the worker to stop its runs."
    : search.failures && !ended ? `Restarted after ${counted(search.failures, "lost lease or infrastructure error", "lost leases or infrastructure errors")}.` : "";
  byId("notice").hidden = !notice;
  text("notice", notice);
  const counts = search.trial_counts;
  const done = (counts.complete || 0) + (counts.failed || 0) + (counts.stopped || 0);
  const total = search.runs_total;
  const rounds = search.progress;
  const share = rounds && rounds.total ? rounds.spent / rounds.total : total ? done / total : 0;
  byId("bar").style.width = `${100 * Math.min(share, 1)}%`;
  const parts = Object.entries(counts).map(([state, n]) => `${n} ${state}`);
  const until = search.finished_at || Date.now() / 1000;
  const took = search.started_at ? ` · ${Math.max(0, Math.round(until - search.started_at))} s` : "";
  const phase = rounds && rounds.phase && !ended ? `${rounds.phase}, round ${rounds.round}; ` : "";
  const cost = rounds ? ` · ${flops(rounds.spent)}${rounds.total ? ` of ${flops(rounds.total)}` : ""} ${rounds.unit}${rounds.stopped_flops ? `, ${flops(rounds.stopped_flops)} train FLOPs in stopped runs` : ""}` : "";
  document.querySelector("[role=progressbar]").ariaValueNow = Math.round(100 * Math.min(share, 1));
  text("progress", rounds && parts.length ? `${phase}${counted(done, "run")} finished (${parts.join(", ")})${cost}${took}` : total ? `${done} of ${counted(total, "run")} finished (${parts.join(", ")})${took}`
    : search.state === "paused" ? "paused before its first run" : workers === 0 ? "no worker is running: start one with the command einsum-nas worker" : "waiting for a worker");
}

function showDetail(live) {
  byId("undrawn").hidden = live.curves_total > 0;
  byId("plots").hidden = !live.curves_total;
  const [shown, total] = [live.points_shown, live.points_total].map((n) => n.toLocaleString("en"));
  const dots = shown === total ? "" : `Shown are ${shown} of ${total} points: the fronts, every point that lies apart, and one of those that coincide. `;
  const curves = live.curves.data.length;
  const lines = curves === live.curves_total ? "" : `Of ${live.curves_total.toLocaleString("en")} learning curves the ${curves} lowest are shown.`;
  byId("detail").hidden = !dots && !lines;
  text("detail", dots + lines);
}

// budgets that runs of this search reached, on a logarithmic slider
let budgets = null;
const chosenBudget = () => budgets[0] * (budgets[1] / budgets[0]) ** (byId("budget").valueAsNumber / STEPS);

function showBudget(live) {
  budgets = live.budgets;
  byId("budgets").hidden = !budgets;
  if (!budgets) return;
  const slider = byId("budget");
  const at = Math.log(live.budget / budgets[0]) / Math.log(budgets[1] / budgets[0]);
  slider.max = STEPS;
  if (document.activeElement !== slider) slider.valueAsNumber = Math.round(STEPS * at);
  slider.setAttribute("aria-valuetext", `${flops(live.budget)} train FLOPs`);
  text("budget-text", flops(live.budget));
  byId("own").hidden = live.budget === live.search.request.train_flops;
}

// the lines of the power laws take longer than all the rest: until they are there, those of before
// stay
let laws = [];

function drawScatter({ data, layout }, open) {
  const more = byId("axis").value === "train_flops" ? laws : [];
  return draw(byId("scatter"), { data: [...data, ...more], layout }, open);
}

// not before the browser has shown what was drawn; a page in the background shows nothing
const painted = () => new Promise((go) => (document.hidden ? go() : requestAnimationFrame(() => setTimeout(go))));

// what was drawn last, with the axis it is of
let shown = null;

// the document of all that is shown, of which only what changed has come, where that is enough
function completed(live, x, before) {
  if (live.changed) {
    const changed = new Set(live.changed);
    for (const name of ["scatter", "curves"]) live[name] = whole(before.live[name], live[name], changed);
  }
  if (!live.scatter || !live.curves) return null;
  shown = { live, x };
  return live;
}

async function refresh() {
  const began = performance.now();
  const here = new URLSearchParams(location.search);
  const x = byId("axis").value;
  const asked = new URLSearchParams({ x });
  if (here.get("budget")) asked.set("budget", here.get("budget"));
  const before = shown;
  if (before && before.x === x) asked.set("since", before.live.last);
  let response;
  try {
    response = await ask(service, `/searches/${id}/live?${asked}`);
    if (!response.ok) throw new Error((await response.json()).detail);
  } catch (error) {
    // a service that restarts, a network that is away: what is shown stays, and says how old it is
    text("connection", response ? `Not up to date: ${error.message}` : "The service does not answer; the page shows what it said last, and tries again.");
    return;
  }
  const live = completed(await response.json(), x, before);
  text("connection", "");
  if (!live) {
    shown = null;
    await refresh();
    return;
  }
  showSearch(live.search, live.workers, live.can_retry);
  showBudget(live);
  showBest(live.best, service);
  showLeftOut(live.measured);
  showDetail(live);
  const best = live.best && live.best.best_structured;
  const open = (trial) => location.assign(`${service}/trials/${trial}`);
  const rows = refreshTrials(best && best.trial_id);
  if (live.curves_total) {
    await drawScatter(live.scatter, open);
    await painted();  // the front is seen while the curves are drawn
    await draw(byId("curves"), live.curves, open);
  }
  await rows;
  root.dataset.ready = live.search.state;
  if (live.curves_total && byId("axis").value === "train_flops") {
    const fitted = await ask(service, `/searches/${id}/laws`).catch(() => null);
    if (fitted && fitted.ok) laws = await fitted.json();
    await drawScatter(live.scatter, open);
  }
  root.dataset.laws = laws.length;
  pause = Math.max(1000, 4 * (performance.now() - began));
}

let waiting = false;
// many events may come at once; a search of which a refresh takes long is not refreshed all the time
let pause = 1000;
function soon() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => { waiting = false; refresh(); }, pause);
}

let events = null;
function follow() {
  if (events) events.close();
  const own = events = new EventSource(`${service}/v1/searches/${id}/events`);
  // the stream was refused, for example because the session has ended or too many are open
  own.addEventListener("open", soon);
  own.addEventListener("error", () => {
    soon();
    if (own.readyState !== EventSource.CLOSED) return;
    setTimeout(() => { if (events === own) follow(); }, 10_000);
  });
  const kinds = ["claimed", "trial_planned", "trial_started", "point", "trial_complete", "trial_failed",
    "trial_stopped", "trial_paused", "round", "lease_lost", "requeued", "handed_back", "cancel_requested", "pause_requested",
    "paused", "resumed", "retried", "priority", "labels", "restored"];
  for (const kind of kinds) own.addEventListener(kind, soon);
  // the stream starts with the oldest event: an end may be one that a retry followed
  for (const kind of TERMINAL) {
    own.addEventListener(kind, async () => {
      await refresh();
      if (TERMINAL.includes(root.dataset.ready)) own.close();
    });
  }
}

// change the search; what the service answers, or null where it refuses, which is shown
async function act(name, body) {
  const sent = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await ask(service, `/v1/searches/${id}/${name}`, { method: "POST", ...sent });
  if (response.status === 401) return null;
  const found = await response.json();
  byId("notice").hidden = response.ok;
  text("notice", response.ok ? "" : found.detail);
  return response.ok ? found : null;
}

byId("axis").addEventListener("change", () => { keep({ x: byId("axis").value }); refresh(); });
byId("budget").addEventListener("input", () => text("budget-text", flops(chosenBudget())));
byId("budget").addEventListener("change", () => { keep({ budget: chosenBudget().toPrecision(4) }); refresh(); });
byId("own").addEventListener("click", () => { keep({ budget: "" }); refresh(); });
for (const button of document.querySelectorAll("button.act")) {
  button.addEventListener("click", async () => {
    const name = button.dataset.act;
    if (ASKED[name] && !confirm(ASKED[name])) return;
    if (!(await act(name))) return;
    if (name === "delete") location.assign(`${service}/`);
    if (name === "retry") follow();
    soon();
  });
}
byId("labels").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target.elements;
  const tags = form.tags.value.split(",").map((tag) => tag.trim()).filter(Boolean);
  const labels = { name: form.name.value.trim() || null, tags, notes: form.notes.value || null, archived: form.archived.checked };
  if (await act("labels", labels)) location.reload();
});
byId("again").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target.elements;
  const made = await act("confirm", { seeds: form.seeds.valueAsNumber, top: form.top.valueAsNumber });
  if (made) location.assign(`${service}/searches/${made.id}`);
});
byId("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await act("priority", { priority: event.target.elements.priority.valueAsNumber })) location.reload();
});
const asked = new URLSearchParams(location.search).get("x");
if ([...byId("axis").options].some((o) => o.value === asked)) byId("axis").value = asked;
refresh().then(() => { if (!TERMINAL.includes(root.dataset.ready)) follow(); });
