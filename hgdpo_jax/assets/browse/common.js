"use strict";
// What the scripts of a page share.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);

// An element with attributes (false: none) and children, which are elements or text.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

const button = (attributes, action, ...children) => {
  const element = make("button", { type: "button", ...attributes }, ...children);
  element.addEventListener("click", action);
  return element;
};

const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const shown = (value, digits = 3) => value.toFixed(digits).replace("-", "−");

// What this browser keeps for a page; a browser that keeps nothing for files says so once.
const kept = (key) => {
  try { return JSON.parse(localStorage.getItem(key)) ?? {}; } catch { return {}; }
};
const keep = (key, value) => {
  try { localStorage.setItem(key, JSON.stringify(value)); } catch { byId("unkept").hidden = false; }
};

// Hands a file of JSON to the person.
const save = (name, value) => {
  const text = JSON.stringify(value, null, 1) + "\n";
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  return text;
};

// Numbers in [0, 1), the same ones from the same text.
const lots = (text) => {
  let state = 2166136261;
  for (const letter of text) state = Math.imul(state ^ letter.codePointAt(0), 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
};

const shuffle = (items, lot) => {
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(lot() * (i + 1));
    [items[i], items[j]] = [items[j], items[i]];
  }
  return items;
};
