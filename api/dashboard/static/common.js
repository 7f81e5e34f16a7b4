// What the scripts of several pages share.
export const byId = (name) => document.getElementById(name);
export const fixed = (x, digits = 4) => x.toFixed(digits).replace("-", "−");
export const signed = (x) => (x >= 0 ? "+" : "") + fixed(x);
// four digits, without zeros that say nothing
export function flops(x) {
  const short = Number(x.toPrecision(4));
  return short < 1e5 ? String(short) : short.toExponential().replace("e+", "e");
}
export const counted = (n, noun, plural = `${noun}s`) => `${n.toLocaleString("en")} ${n === 1 ? noun : plural}`;

export function text(name, value) {
  const element = byId(name);
  // a live region is read out again where its text is set, even to the same
  if (element.textContent !== value) element.textContent = value;
}

export function link(href, words) {
  const a = document.createElement("a");
  a.href = href;
  a.textContent = words;
  return a;
}

export function cell(row, value, number = false) {
  const td = row.insertCell();
  td.append(value);
  if (number) td.className = "n";
  return td;
}

// fetch; where the session has ended, go to the sign-in page, which leads back here
export async function ask(service, path, options) {
  const response = await fetch(`${service}${path}`, options);
  if (response.status === 401) {
    const here = location.pathname + location.search;
    location.assign(`${service}/login?next=${encodeURIComponent(here)}`);
  }
  return response;
}

// what a page shows stands in its URL, so that it can be sent to someone; empty values are left out
export function keep(changes) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value) query.set(name, value);
    else query.delete(name);
  }
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
}
