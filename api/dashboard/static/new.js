"use strict";
// The form of a search: asks the service what it would run at each change, then submits it.
const form = document.getElementById("new");
const service = form.dataset.service;
const byId = (name) => document.getElementById(name);
const NUMBERS = ["train_flops", "total_train_flops", "trials", "replicates", "seed", "priority"];
const TEXTS = ["task", "data", "sampler", "stopping", "objective"];
const number = (x) => {
  const [digits, power] = x.toPrecision(4).split("e");
  const short = digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits;
  return power ? `${short}e${Number(power)}` : short;
};
const exact = (x) => (typeof x === "number" && x >= 1e6 ? x.toExponential().replace("e+", "e") : String(x));

// what the form says, as a request; a number that is none stays text, which the service refuses
function request() {
  const fields = form.elements;
  const found = {};
  for (const name of TEXTS) if (fields[name].value.trim()) found[name] = fields[name].value.trim();
  for (const name of NUMBERS) {
    const text = fields[name].value.trim();
    if (text) found[name] = Number.isFinite(Number(text)) ? Number(text) : text;
  }
  const families = [...form.querySelectorAll("[name=families]:checked")].map((box) => box.value);
  if (families.join() !== "einsum") found.space = { families };
  const more = fields.more.value.trim();
  if (!more) return found;
  const own = JSON.parse(more);
  if (own.space && found.space) own.space = { ...found.space, ...own.space };
  return { ...found, ...own };
}

function fill(given) {
  const rest = { ...given };
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (given[name] === undefined || given[name] === null) continue;
    form.elements[name].value = given[name];
    delete rest[name];
  }
  if (given.space && given.space.families) {
    for (const box of form.querySelectorAll("[name=families]")) box.checked = given.space.families.includes(box.value);
    const { families, ...others } = given.space;
    rest.space = others;
    if (!Object.keys(others).length) delete rest.space;
  }
  if (Object.keys(rest).length) form.elements.more.value = JSON.stringify(rest);
}

function refuse(why) {
  byId("refusal").hidden = !why;
  byId("refusal").textContent = why || "";
  byId("submit").disabled = Boolean(why);
}

function span(seconds) {
  for (const [unit, size] of [["days", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= size) return `${number(seconds / size)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

function show(found) {
  const rows = [
    ["dense references", found.references.map((r) => `width ${r.width}: ${r.steps.toLocaleString("en")} steps`).join("; ")],
    ["runs", found.total_runs === null ? `as many as the rule ${found.stopping_rule} begins` : found.total_runs.toLocaleString("en")],
    ["train FLOPs", `at most ${number(found.total_train_flops_at_most)}`],
    ["time of training", found.train_seconds_at_most === null ? "not known: no run of this task was timed here yet"
      : `about ${span(found.train_seconds_at_most)} at most, one run after another (estimate from the newest runs here)`],
    ["smallest budget of a run", number(found.minimum_train_flops)],
  ];
  if (found.parts) {
    const p = found.parts;
    rows.push(["exploring", `${number(p.exploring)} train FLOPs, ${p.least_candidates.toLocaleString("en")} to ${p.most_candidates.toLocaleString("en")} candidates`]);
    rows.push(["confirming", `${number(p.confirming)} train FLOPs: ${p.confirmed} candidates and dense, ${p.fresh_seeds} fresh seeds each`]);
  }
  for (const [name, widths] of Object.entries(found.widths)) {
    const ends = [widths[0], widths[widths.length - 1]];
    if (ends[0]) rows.push([`widths of ${name}`, ends.map(([w, s]) => `${w} (${s.toLocaleString("en")} steps)`).join(" to ")]);
  }
  byId("preview").replaceChildren(...rows.flatMap((row) => row.map((text, i) => {
    const part = document.createElement(i ? "dd" : "dt");
    part.textContent = text;
    return part;
  })));
}

const quoted = (text) => (/^[\w.,:\/+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

// `search` has an option for each field but for those of `more`, which `curl` has all
function showWords(body) {
  const flags = Object.entries(body).flatMap(([name, value]) => {
    if (name === "space") return Object.entries(value).map(([n, v]) => `--${n} ${v.join(",")}`);
    if (name === "limits") return Object.entries(value).map(([n, v]) => `--${n === "total_train_flops" ? "most-train-flops" : n.replaceAll("_", "-")} ${v}`);
    if (name === "overrides") return Object.entries(value).map(([n, v]) => `--set ${n}=${v}`);
    return value !== null && typeof value === "object" ? [] : [`--${name.replaceAll("_", "-")} ${quoted(exact(value))}`];
  });
  byId("cli").textContent = ["einsum-nas search", ...flags].join(" ");
  byId("curl").textContent = `curl -X POST ${location.origin}${service}/v1/searches -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}`;
}

async function post(path, body) {
  const response = await fetch(`${service}/v1/searches${path}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  }).catch(() => null);
  if (!response) return [false, "The service does not answer; try again."];
  if (response.status === 401) location.assign(`${service}/login?next=${encodeURIComponent(location.pathname)}`);
  const found = await response.json();
  return response.ok ? [true, found] : [false, found.detail];
}

let asked = 0;
async function preview() {
  const own = asked += 1;
  let body;
  try { body = request(); } catch (error) { refuse(`more fields: ${error.message}`); return; }
  showWords(body);
  const [ok, found] = await post("/preview", body);
  if (own !== asked) return; // a later question is on its way
  refuse(ok ? null : found);
  if (ok) show(found);
  form.dataset.ready = String(own);
}

let timer = null;
form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(preview, 400); });
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("submit").disabled = true;
  const [ok, found] = await post("", request());
  if (ok) location.assign(`${service}/searches/${found.id}`);
  else refuse(found);
});
fill(JSON.parse(form.dataset.given));
preview();
