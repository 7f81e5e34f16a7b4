"use strict";
// The page of one search: listens to its events and redraws from one JSON document.
const root = document.getElementById("search");
const id = root.dataset.id;
// path below which the service is served; empty for most
const service = root.dataset.service;
const byId = (name) => document.getElementById(name);
const TERMINAL = ["succeeded", "failed", "cancelled"];
const fixed = (x, digits = 4) => x.toFixed(digits).replace("-", "−");
const signed = (x) => (x >= 0 ? "+" : "") + fixed(x);
const flops = (x) => x.toPrecision(4).replace(/e\+?/, "e");

function text(name, value) { byId(name).textContent = value; }

const counted = (n, noun, plural = `${noun}s`) => `${n.toLocaleString("en")} ${n === 1 ? noun : plural}`;

function runNote(run) {
  const seeds = run.confirmed ? `, confirmed with ${counted(run.seeds, "fresh seed")}` : run.seeds > 1 ? `, ${run.seeds} seeds` : "";
  return `${run.name}, width ${run.width}, ${counted(run.steps, "step")}${seeds}`;
}

function range(interval, show) { return interval ? `95%: ${show(interval[0])} to ${show(interval[1])}` : "no interval"; }
const ratio = (x) => (x < 1000 ? x.toFixed(2) : x.toPrecision(3));
const bound = (m) => `${{ at_least: "≥ ", less_than: "< " }[m.kind] || ""}${ratio(m.value)}×`;

// the runs that a figure on a measured axis does not show
function showLeftOut(measured) {
  const others = measured.other_devices.map((d) => `${counted(d.runs, "run")} on ${d.name}`);
  if (measured.not_timed) others.push(`${counted(measured.not_timed, "completed run")} whose seconds, or whose device, are not recorded`);
  text("left-out", others.length ? `Left out, for times of different devices do not compare: ${others.join("; ")}.` : "");
}

function showBest(best) {
  if (!best) return;
  for (const kind of ["structured", "dense"]) {
    const run = best[`best_${kind}`];
    if (!run) continue;
    text(kind, fixed(run.loss));
    text(`${kind}-note`, runNote(run));
  }
  const samples = best.kind === "measured" && best.evidence.noise === null ? ", of the validation samples alone" : "";
  const gap = best.dense_minus_structured;
  if (gap) text("difference", signed(gap.difference));
  text("verdict", best.verdict);
  text("difference-note", `${gap ? `${range(gap.difference_interval, signed)}${samples}; ` : ""}${best.verdict_reason.replaceAll("`", "")}`);
  const m = best.structured_multiplier;
  if (m) {
    text("multiplier", m.value === null ? "unknown" : bound(m));
    text("multiplier-verdict", m.value !== null && best.verdict === "unconfirmed" ? best.verdict : "");
    const meaning = {
      at_least: "a lower bound: structured curves begin below the best dense loss",
      less_than: "an upper bound: structured runs do not reach the best dense loss within the budget",
    }[m.kind] || `compute of dense over structured at the best dense loss; ${range(m.interval, ratio)}`;
    text("multiplier-note", m.reason || `${meaning}; ${counted(m.seeds, "seed")}`);
  }
  const r = best.structured_realised_multiplier;
  if (r) {
    const shared = r.together.length > 1 ? `; of runs trained ${r.together.join(" and ")} at a time, each with its share` : "";
    text("realised", r.value === null ? `In seconds unknown: ${r.reason}.`
      : `In measured seconds ${bound(r)}: ${r.kind === "exact" ? range(r.interval, ratio) : "a bound too"}; ${counted(r.seeds, "seed")}${r.device ? `, on ${r.device}` : ""}${shared}.`);
  }
  const tau = best.confirmation;
  const held = tau && tau.tau !== null
    ? ` Ranking against ${counted(tau.candidates, "confirmed run")}: Kendall's τ ${fixed(tau.tau, 2)}${tau.interval ? ` (95%: ${fixed(tau.interval[0], 2)} to ${fixed(tau.interval[1], 2)})` : ""}.`
    : " The best has not been confirmed with fresh seeds yet.";
  const [near, compared] = [best.indistinguishable.length, best.evidence.compared];
  const others = compared === 1 ? "the one other structure" : `the ${compared} next best structures`;
  const told = !compared ? "there is no other structure to compare with"
    : !near ? `the best is clearly different from ${others}${samples}`
    : compared === 1 ? `the one other structure is not clearly different from the best${samples}`
    : `${near} of ${others} ${near === 1 ? "is" : "are"} not clearly different from the best${samples}`;
  text("evidence", `${counted(best.evidence.trials, "completed run")}; ${told}.${held}`);
  text("means", `Comparisons: ${best.comparisons_mean}.`);
}

// the family with its main options: cores of a chain, experts of a mixture, heads
function shortName(name) {
  const experts = /experts=(\d+),active=(\d+)/.exec(name);
  const mixed = experts ? ` ${experts[2]} of ${experts[1]}` : "";
  const cores = /cores=(\d+)/.exec(name);
  const many = cores ? ` ${cores[1]} cores` : "";
  return name.split(/[:@]/)[0] + many + mixed + (name.endsWith("@heads") ? " @heads" : "");
}

function cell(row, value, number = false) {
  const td = row.insertCell();
  td.textContent = value;
  if (number) td.className = "n";
  return td;
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

function showTrials(trials, total, best) {
  const body = document.createElement("tbody");
  body.id = "trials";
  const seeds = new Set(trials.map((t) => t.seed)).size;
  for (const t of trials) {
    const row = body.insertRow();
    row.className = t.kind;
    if (best && best.best_structured && best.best_structured.trial_id === t.id) row.classList.add("best");
    cell(row, t.number, true);
    const kind = t.kind === "candidate" ? "" : ` (${t.kind})`;
    const seed = seeds > 1 ? `, seed ${t.seed}` : "";
    cell(row, shortName(t.name) + kind + seed).title = t.name;
    const shown = cell(row, exponents(t.theta));
    shown.classList.add("mono", "exponents");
    shown.title = t.design;
    const state = document.createElement("span");
    state.className = `state ${t.state}`;
    state.textContent = t.reused_from === null ? t.state : `${t.state} (reused)`;
    if (t.error) state.title = t.error;
    row.insertCell().append(state);
    cell(row, t.loss === null ? "–" : t.loss.toFixed(4), true);
    cell(row, t.width, true);
    cell(row, t.steps.toLocaleString("en"), true);
    cell(row, flops(t.train_flops), true);
    cell(row, t.params.toLocaleString("en"), true);
  }
  byId("trials").replaceWith(body);
  byId("more").hidden = trials.length === total;
  text("more", `Only the first ${trials.length} of ${total} trials are shown; ${service}/v1/searches/${id}/trials lists all.`);
}

function showSearch(search, workers, canRetry) {
  byId("state").textContent = search.state;
  byId("state").className = `state ${search.state}`;
  const ended = TERMINAL.includes(search.state);
  const possible = {
    cancel: !ended,
    pause: ["queued", "running"].includes(search.state) && !search.pause_requested,
    resume: search.state === "paused" || search.pause_requested,
    retry: ended && canRetry,
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
  byId("bar").style.width = total ? `${(100 * done) / total}%` : "0";
  const parts = Object.entries(counts).map(([state, n]) => `${n} ${state}`);
  const until = search.finished_at || Date.now() / 1000;
  const took = search.started_at ? ` · ${Math.max(0, Math.round(until - search.started_at))} s` : "";
  text("progress", total ? `${done} of ${counted(total, "run")} finished (${parts.join(", ")})${took}`
    : search.state === "paused" ? "paused before its first run" : workers === 0 ? "no worker is running: start one with `einsum-nas worker`" : "waiting for a worker");
}

// fetch; where the session has ended, go to the sign-in page, which leads back here
async function ask(path, options) {
  const response = await fetch(path, options);
  if (response.status === 401) location.assign(`${service}/login?next=${encodeURIComponent(location.pathname)}`);
  return response;
}

async function refresh() {
  const response = await ask(`${service}/searches/${id}/live?x=${encodeURIComponent(byId("axis").value)}`);
  if (!response.ok) return;
  const live = await response.json();
  showSearch(live.search, live.workers, live.can_retry);
  showBest(live.best);
  showLeftOut(live.measured);
  showTrials(live.trials, live.trials_total, live.best);
  // without these settings Plotly shows a button that sends the chart to its own site
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "" };
  for (const name of ["scatter", "curves"]) {
    await Plotly.react(name, live[name].data, { ...live[name].layout, template: {} }, config);
  }
  root.dataset.ready = live.search.state;
}

let waiting = false;
function soon() { // redraw in a second: many events may come at once
  if (waiting) return;
  waiting = true;
  setTimeout(() => { waiting = false; refresh(); }, 1000);
}

let events = null;
function follow() {
  if (events) events.close();
  const own = events = new EventSource(`${service}/v1/searches/${id}/events`);
  // the stream was refused, for example because the session has ended or too many are open
  own.addEventListener("error", () => {
    if (own.readyState !== EventSource.CLOSED) return;
    soon();
    setTimeout(() => { if (events === own) follow(); }, 10_000);
  });
  const kinds = ["claimed", "trial_planned", "trial_started", "point", "trial_complete", "trial_failed",
    "trial_stopped", "lease_lost", "requeued", "handed_back", "cancel_requested", "pause_requested",
    "paused", "resumed", "retried", "priority", "restored"];
  for (const kind of kinds) own.addEventListener(kind, soon);
  // the stream starts with the oldest event: an end may be one that a retry followed
  for (const kind of TERMINAL) {
    own.addEventListener(kind, async () => {
      await refresh();
      if (TERMINAL.includes(root.dataset.ready)) own.close();
    });
  }
}

byId("axis").addEventListener("change", refresh);
for (const button of document.querySelectorAll("button.act")) {
  button.addEventListener("click", async () => {
    const response = await ask(`${service}/v1/searches/${id}/${button.dataset.act}`, { method: "POST" });
    if (response.status === 401) return;
    if (!response.ok) { byId("notice").hidden = false; text("notice", (await response.json()).detail); return; }
    if (button.dataset.act === "retry") follow();
    soon();
  });
}
refresh().then(() => { if (!TERMINAL.includes(root.dataset.ready)) follow(); });
