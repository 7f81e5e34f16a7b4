"use strict";
// The list of searches: updates the cells that change, every few seconds while the page is seen.
const table = document.getElementById("searches");
const status = document.getElementById("status");

async function update() {
  const response = await fetch(`${table.dataset.service}/searches${location.search}`).catch(() => null);
  if (response && response.status === 401) { location.reload(); return; }
  if (!response || !response.ok) {
    status.textContent = "The service does not answer; these are the last values it gave.";
    return;
  }
  const found = await response.json();
  let fresh = Object.keys(found).length;
  for (const row of table.tBodies[0].rows) {
    const cells = found[row.dataset.id];
    if (!cells) continue;
    fresh -= 1;
    for (const cell of row.querySelectorAll("[data-cell]")) {
      const text = cells[cell.dataset.cell];
      if (cell.textContent !== text) cell.textContent = text;
      if (cell.dataset.cell === "state") cell.className = `state ${text}`;
    }
  }
  status.textContent = fresh > 0 ? `${fresh} more ${fresh === 1 ? "search" : "searches"} now: reload to see.` : "";
}

setInterval(() => { if (!document.hidden) update(); }, 3000);
