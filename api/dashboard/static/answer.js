// The answer of a search at a budget: best structured, best dense, and how sure that is.
import { byId, cell, counted, fixed, flops, link, signed, text } from "./common.js";

function runNote(run) {
  const seeds = run.confirmed ? `, confirmed with ${counted(run.seeds, "fresh seed")}` : run.seeds > 1 ? `, ${run.seeds} seeds` : "";
  return `${run.name}, width ${run.width}, ${counted(run.steps, "step")}${seeds}`;
}

function range(interval, show) { return interval ? `95%: ${show(interval[0])} to ${show(interval[1])}` : "no interval"; }
const ratio = (x) => (x < 1000 ? x.toFixed(2) : x.toPrecision(3));
const bound = (m) => `${{ at_least: "≥ ", less_than: "< " }[m.kind] || ""}${ratio(m.value)}×`;

// the runs that a figure on a measured axis does not show
export function showLeftOut(measured) {
  const others = measured.other_devices.map((d) => `${counted(d.runs, "run")} on ${d.name}`);
  if (measured.not_timed) others.push(`${counted(measured.not_timed, "completed run")} whose seconds, or whose device, are not recorded`);
  text("left-out", others.length ? `Left out, for times of different devices do not compare: ${others.join("; ")}.` : "");
}

// an answer of a published table stands here until this search has runs of its own
function showPublished(table, budget) {
  byId("published").hidden = !table;
  if (!table) return;
  const beyond = budget > table.read_at ? ` The answer is of ${flops(table.read_at)} train FLOPs, its greatest budget.` : "";
  text("published", `Published, by no run of this service: ${table.name} (${table.date}), recipe ${table.recipe}, width ${table.widths.join(", ")}, on ${table.machine}.${beyond} The runs of this search take its place.`);
}

export function showBest(best, service) {
  showPublished(best && best.published, best && best.budget);
  if (!best) return;
  for (const kind of ["structured", "dense"]) {
    const run = best[`best_${kind}`];
    text(kind, run ? fixed(run.loss) : "–");
    text(`${kind}-note`, run ? runNote(run) : "");
  }
  showNear(best, service);
  const samples = best.kind !== "predicted" && best.evidence.noise === null ? ", of the validation samples alone" : "";
  const gap = best.dense_minus_structured;
  text("difference", gap ? signed(gap.difference) : "–");
  text("verdict", best.verdict);
  text("difference-note", `${gap ? `${range(gap.difference_interval, signed)}${samples}; ` : ""}${best.verdict_reason.replaceAll("`", "")}`);
  const m = best.structured_multiplier;
  if (!m) for (const name of ["multiplier", "multiplier-verdict", "multiplier-note"]) text(name, name === "multiplier" ? "–" : "");
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
  if (!r) text("realised", "");
  if (r) {
    const shared = r.together.length > 1 ? `; of runs trained ${r.together.join(" and ")} at a time, each with its share` : "";
    text("realised", r.value === null ? `In seconds unknown: ${r.reason}.`
      : `In measured seconds ${bound(r)}: ${r.kind === "exact" ? range(r.interval, ratio) : "a bound too"}; ${counted(r.seeds, "seed")}${r.device ? `, on ${r.device}` : ""}${shared}.`);
  }
  const tau = best.confirmation;
  const held = tau && tau.tau !== null
    ? ` Ranking against ${counted(tau.candidates, "confirmed run")}: Kendall's τ ${fixed(tau.tau, 2)}${tau.interval ? ` (95%: ${fixed(tau.interval[0], 2)} to ${fixed(tau.interval[1], 2)})` : ""}.`
    : best.published ? "" : " The best has not been confirmed with fresh seeds yet.";
  const [near, compared] = [best.indistinguishable.length, best.evidence.compared];
  const others = compared === 1 ? "the one other structure" : `the ${compared} next best structures`;
  const told = !compared ? "there is no other structure to compare with"
    : !near ? `the best is clearly different from ${others}${samples}`
    : compared === 1 ? `the one other structure is not clearly different from the best${samples}`
    : `${near} of ${others} ${near === 1 ? "is" : "are"} not clearly different from the best${samples}`;
  text("evidence", `${counted(best.evidence.trials, "completed run")}${best.published ? ` of ${best.published.name}` : ""}; ${told}.${held}`);
  text("means", `Comparisons: ${best.comparisons_mean}.`);
}

// the structures that the data cannot tell from the best, the nearest first
function showNear(best, service) {
  const rivals = best.indistinguishable;
  byId("near").hidden = !rivals.length;
  text("near-title", `${counted(rivals.length, "structure")} not clearly different from the best, ${best.name} of width ${best.width}`);
  const body = document.createElement("tbody");
  for (const r of rivals) {
    const row = body.insertRow();
    // ids of published runs are negative: they have no page
    cell(row, r.trial_id < 0 ? r.name : link(`${service}/trials/${r.trial_id}`, r.name)).title = r.design;
    for (const value of [r.width, r.steps.toLocaleString("en"), fixed(r.loss), signed(r.difference), r.difference_interval ? range(r.difference_interval, signed) : "unknown", r.seeds]) cell(row, value, true);
  }
  byId("near-rows").replaceChildren(...body.rows);
}
