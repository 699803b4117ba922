// Pictures side by side, as large as the window lets them be, and what can be answered about them.

// The width in px of pictures of w × h, so many in rows of so many columns in a room. Of small ones each pixel is a whole
// number of the screen's.
const widthIn = (room, [w, h], columns, pictures) => {
  const rows = Math.ceil(pictures / columns);
  const width = (room.width - 16 * (columns - 1)) / columns;
  const height = (room.height - 8 * (rows - 1)) / rows - 26; // with the line below each
  const scale = Math.min(width / w, height / h);
  const whole = Math.floor(scale * devicePixelRatio) / devicePixelRatio;
  return Math.max(0, Math.max(w, h) <= 256 && scale >= 2 ? w * whole : w * scale);
};

class Viewer {
  // `close`: what its × does; none has no ×.
  constructor(root, close) {
    this.root = root;
    this.room = make("div", { class: "pictures" });
    root.classList.add("viewer");
    root.tabIndex = -1; // so that keys are heard wherever one clicked
    root.addEventListener("keydown", (event) => this.press(event));
    addEventListener("resize", () => this.fit());
    this.close = close;
    this.keys = {};
  }

  // A view: place and text; pictures [{source, title, answer, chosen}] in order, a or b with the answer that it stands
  // for; size [w, h] of each; question; answers and moves [{label, key, keys, act, chosen, off}].
  show(view) {
    this.view = view;
    this.keys = {};
    const top = make("div", { class: "top" }, make("span", { class: "note" }, view.place), ...(view.extra ?? []));
    if (this.close) top.append(button({ class: "key", "aria-label": "Close" }, this.close, "×"));
    this.room.replaceChildren(...view.pictures.map((picture) => this.figure(picture)));
    const rows = [view.answers, view.moves].map((row) => make("div", { class: "keys" }, ...row.map((a) => this.key(a))));
    const text = make("p", { class: "text" }, view.text);
    const question = make("p", { class: "question", "aria-live": "polite" }, view.question);
    const focused = this.root.contains(document.activeElement) && document.activeElement.textContent;
    this.root.replaceChildren(top, text, this.room, question, ...rows);
    this.root.classList.toggle("small", Math.max(...view.size) <= 256);
    const buttons = [...this.root.querySelectorAll("button:enabled")];
    (buttons.find((each) => each.textContent === focused) ?? this.root).focus();
    this.fit();
  }

  figure({ source, title, act, chosen }) {
    const image = make("img", { src: source, alt: title, decoding: "async" });
    const kind = [act && "answers", chosen && "chosen"].filter(Boolean).join(" ");
    const figure = make("figure", { class: kind }, image, make("figcaption", {}, title));
    if (act) image.addEventListener("click", act);
    return figure;
  }

  key({ label, key, keys, act, chosen, off }) {
    for (const name of keys) this.keys[name] = off ? () => {} : act;
    const state = chosen === undefined ? {} : { "aria-pressed": String(chosen) };
    return button({ class: "key", disabled: off ? "" : false, ...state }, act, make("kbd", {}, key), label);
  }

  press(event) {
    const act = this.keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!event.repeat) act();
  }

  // As many columns as make the pictures largest; rather side by side than a little larger.
  fit() {
    if (!this.view || !this.room.isConnected) return;
    const room = { width: this.room.clientWidth, height: this.room.clientHeight };
    const n = this.view.pictures.length;
    let [best, columns] = [0, n];
    for (let tried = n; tried >= 1; tried--) {
      const width = widthIn(room, this.view.size, tried, n);
      if (width > 1.3 * best) [best, columns] = [width, tried];
    }
    columns = Math.ceil(n / Math.ceil(n / columns)); // no more than these rows need
    const [w, h] = this.view.size;
    for (const image of this.room.querySelectorAll("img")) {
      image.style.width = best + "px";
      image.style.height = (best * h) / w + "px";
    }
    this.room.style.maxWidth = columns * (best + 16) + 16 + "px";
    this.room.style.alignSelf = "center";
    this.room.style.width = "100%";
  }
}
