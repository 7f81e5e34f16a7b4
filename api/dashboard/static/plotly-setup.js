"use strict";
// What the drawing library needs of a page whose policy allows no inline styles and no HTML from
// strings. Loaded before it.

// it writes styles as attributes, which the policy refuses, though not what scripts set on `style`
const setAttribute = Element.prototype.setAttribute;
Element.prototype.setAttribute = function (name, value) {
  if (name === "style") this.style.cssText = value;
  else setAttribute.call(this, name, value);
};

// and of HTML it needs a single entity, such as the × of a button; anything else is refused
if (window.trustedTypes) {
  trustedTypes.createPolicy("default", { createHTML: (html) => (/^(&#?\w+;)?$/.test(html) ? html : null) });
}
