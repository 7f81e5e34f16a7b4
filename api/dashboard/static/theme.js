"use strict";
// Light or dark: as the system has it, or as the person chose on this device. Runs before the page
// is drawn, so that it does not flash in the other colours.
(() => {
  const CHOICES = ["auto", "light", "dark"];
  const SIGNS = { auto: "◐", light: "☀", dark: "☾" };
  const NAMES = { auto: "as the system has them", light: "light", dark: "dark" };
  const stored = () => {
    try { return localStorage.getItem("theme"); } catch { return null; }  // storage may be refused
  };
  let chosen = CHOICES.includes(stored()) ? stored() : "auto";

  function show() {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    const button = document.getElementById("theme");
    if (!button) return;
    button.textContent = SIGNS[chosen];
    button.setAttribute("aria-label", `Colours: ${NAMES[chosen]}`);
    button.title = `Colours: ${NAMES[chosen]}`;
  }

  show();
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = CHOICES[(CHOICES.indexOf(chosen) + 1) % CHOICES.length];
      try { localStorage.setItem("theme", chosen); } catch { /* for this page only, then */ }
      show();
    });
  });
})();
