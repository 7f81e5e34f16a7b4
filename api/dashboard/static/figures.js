// Draws the figures that a page brings along, one in each element with data-figure; a click on a run
// leads to it.
import { draw } from "./figure.js";

function canDraw3d() {
  const canvas = document.createElement("canvas");
  return Boolean(canvas.getContext("webgl") || canvas.getContext("experimental-webgl"));
}

async function show(place) {
  const figure = JSON.parse(place.dataset.figure);
  if (figure.data.some((trace) => trace.type === "scatter3d") && !canDraw3d()) {
    place.classList.add("undrawn");
    place.textContent = "This browser has no WebGL, which figures in three dimensions need. The other figures and the table below show the same runs.";
    place.dataset.ready = "undrawn";
    return;
  }
  await draw(place, figure, (trial) => location.assign(`${place.dataset.service}/trials/${trial}`));
  place.dataset.ready = "true";
}

for (const place of document.querySelectorAll("[data-figure]")) show(place);
