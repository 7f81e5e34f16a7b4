// Draws a figure, and gives it away: as PNG, SVG and CSV, and as a table for those who do not see it.
// Plotly is loaded as a classic script before.

// without these settings Plotly shows a button that sends the chart to its own site
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "" };
//: Rows of a table in a page, at most; the CSV file has all.
const MOST_ROWS = 1000;
const COORDINATES = ["x", "y", "z", "a", "b", "c"];

// on a narrow page the legend would cover the title, and so would the unit beside it: the legend goes
// below the figure, and the unit stands in the tables
function placed(layout, width) {
  if (width > 520 || !layout.legend) return { ...layout, template: {} };
  const legend = { ...layout.legend, x: 0, xanchor: "left", y: -0.3, yanchor: "top" };
  const title = layout.yaxis?.title && { text: layout.yaxis.title.text.split("<br>")[0] };
  const yaxis = title ? { ...layout.yaxis, title } : layout.yaxis;
  return { ...layout, template: {}, legend, yaxis, margin: { ...layout.margin, t: 40, b: 130 } };
}

// texts of figures have line breaks and escaped signs for plotly
const plain = (text) => String(text ?? "").replace(/<br>/g, ", ").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");

// [names of columns, rows] of all that a figure draws
export function rowsOf({ data, layout }) {
  const used = COORDINATES.filter((c) => data.some((trace) => trace[c]));
  const named = (c) => plain(layout[`${c}axis`]?.title?.text ?? layout.scene?.[`${c}axis`]?.title?.text ?? layout.ternary?.[`${c}axis`]?.title?.text) || c;
  const rows = data.filter((trace) => trace.hoverinfo !== "skip").flatMap((trace) => (trace[used[0]] || []).flatMap((value, i) =>
    value === null ? [] : [[plain(trace.name), ...used.map((c) => trace[c][i]), plain(Array.isArray(trace.text) ? trace.text[i] : "")]]));
  return [["series", ...used.map(named), "point"], rows];
}

const quoted = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));

function save(name, type, content) {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([content], { type }));
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}

function fill(table, [columns, rows]) {
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const name of columns) {
    const th = document.createElement("th");
    th.scope = "col";
    th.textContent = name;
    head.append(th);
  }
  const body = table.createTBody();
  for (const row of rows.slice(0, MOST_ROWS)) {
    const tr = body.insertRow();
    for (const value of row) tr.insertCell().textContent = typeof value === "number" ? Number(value.toPrecision(6)) : value;
  }
  if (rows.length > MOST_ROWS) table.createCaption().textContent = `The first ${MOST_ROWS} of ${rows.length.toLocaleString("en")} rows; the CSV file has all.`;
}

function tools(element) {
  const bar = document.createElement("div");
  bar.className = "tools";
  const name = document.title.replace(/[^\w-]+/g, "-") + `-${element.id}`;
  const button = (label, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = label;
    made.addEventListener("click", act);
    bar.append(made);
  };
  for (const format of ["png", "svg"]) {
    button(format.toUpperCase(), () => Plotly.downloadImage(element, { format, filename: name, width: 1000, height: 600, scale: format === "png" ? 2 : 1 }));
  }
  button("CSV", () => {
    const [columns, rows] = rowsOf(element.drawn);
    save(`${name}.csv`, "text/csv", [columns, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n");
  });
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Data";
  const scroll = document.createElement("div");
  scroll.className = "table data";
  scroll.tabIndex = 0;
  const table = document.createElement("table");
  scroll.append(table);
  details.append(summary, scroll);
  details.addEventListener("toggle", () => { if (details.open) fill(table, rowsOf(element.drawn)); });
  element.refill = () => { if (details.open) fill(table, rowsOf(element.drawn)); };
  bar.append(details);
  element.after(bar);
}

// What a trace of runs has for each point.
const OF_POINTS = ["x", "y", "text", "customdata"];

// the figure of which only the points of runs that changed have come, whole again by those that were
// drawn before; null where those are not enough
export function whole(before, { data, layout }, changed) {
  const drawn = new Map(before.data.map((trace) => [trace.uid, trace]));
  const joined = data.map((trace) => {
    if (trace.meta !== "runs") return trace;
    const old = drawn.get(trace.uid);
    if (!old) return trace;
    const kept = old.customdata.flatMap((run, i) => (changed.has(run) ? [] : [i]));
    return { ...trace, ...Object.fromEntries(OF_POINTS.map((name) => [name, [...kept.map((i) => old[name][i]), ...trace[name]]])) };
  });
  const lacking = joined.some((trace, i) => trace.meta === "runs" && !trace.x.length && !drawn.has(data[i].uid));
  return lacking ? null : { data: joined, layout };
}

export async function draw(element, figure, open = null) {
  if (!element.drawn) tools(element);
  element.drawn = figure;
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", plain(figure.layout.title?.text));
  await Plotly.react(element, figure.data, placed(figure.layout, element.clientWidth), CONFIG);
  element.refill();
  if (!open) return;
  element.removeAllListeners("plotly_click");
  element.on("plotly_click", (event) => { if (event.points[0].customdata) open(event.points[0].customdata); });
}
