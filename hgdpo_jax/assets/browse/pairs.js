// The page of a run's pairs: a stage with its figures, its pairs in an order, and one pair at a time to be rated.

const AT_ONCE = 60; // cards that are added as one scrolls
const WORDS = { winner: "winner is better", loser: "swapped", equal: "equal, left out", neither: "dropped" };
const ratings = new Ratings(data.stages);
const [search, order, split, rated, list, more] = ["search", "order", "split", "rated", "list", "more"].map(byId);
const dialog = document.querySelector("dialog");
let stage = data.stages[0], rows = [], cards = [];

const gap = (row) => row[WINNER_SCORE] - row[LOSER_SCORE];
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const pictureOf = (row, which) => "pictures/" + row[which];
const sizes = new Map();
const sizeOf = (row) => { // [width, height]
  if (!sizes.has(row[SPLIT])) sizes.set(row[SPLIT], row[SPLIT].split("_")[1].split("x").map(Number).reverse());
  return sizes.get(row[SPLIT]);
};
const howWon = (row) => {
  if (stage.winner === "pool") return `picture ${row[NUMBER] + 1} of ${stage.pool}`;
  return stage.winner === "sdrecon" ? `redrawn from ${percent(row[NUMBER] / 10)} noise` : "";
};

// What the stage is, in words and histograms.
const about = () => {
  const winners = {
    pool: `the best of ${stage.pool} drawings for the caption`,
    sdrecon: "the best reconstruction of the photograph",
    photograph: "the photograph",
    given: "as given",
  };
  const titles = Object.fromEntries(data.stages.map(({ name, title }) => [name, title]));
  const losers = { pool: stage.winner === "pool" ? "the worst" : "a drawing", given: "as given", sdrecon: "the photograph, redrawn" };
  const loser = losers[stage.loser] ?? `the winner of ${titles[stage.loser] ?? stage.loser}`;
  const train = stage.rows.filter((row) => row[SPLIT].startsWith("train_")).length;
  const lines = [
    `Winner: ${winners[stage.winner]}. Loser: ${loser}.`,
    `${count(train, "pair")} to train on, ${stage.rows.length - train} held out${stage.finished ? "." : " so far."}`,
  ];
  if (!stage.finished) lines.push("The stage is not finished. Run the command again for what has come since.");
  if (stage.kept !== null) lines.push(`The filter keeps ${percent(stage.kept)}, where the winner scores at least as high as the loser.`);
  const strengths = new Map();
  if (stage.winner === "sdrecon") for (const row of stage.rows) {
    strengths.set(row[NUMBER], (strengths.get(row[NUMBER]) ?? 0) + 1);
  }
  if (strengths.size > 1) {
    const shares = [...strengths].sort(([a], [b]) => a - b).map(([k, n]) => `${percent(k / 10)} (${n})`);
    lines.push(`Noise of the winners: ${shares.join(", ")}.`);
  }
  const reasons = Object.entries(stage.without).map(([reason, n]) => `${reason} (${n})`);
  if (reasons.length) lines.push(`Without a pair: ${reasons.join(", ")}.`);
  const { winner, loser: swapped, equal, neither } = ratings.counts(stage);
  const changed = ratings.changed(stage);
  if (winner + swapped + equal + neither || changed) {
    const found = `${winner} confirmed, ${swapped} swapped, ${equal} equal, ${neither} dropped`;
    lines.push(`Rated: ${found}. ${changed ? "Save them, and give the file to pairs." : "The run uses them."}`);
  }
  const figures = [];
  if (stage.scored && stage.rows.length) {
    const scores = (name, which) => ({ name, values: stage.rows.map((row) => row[which]) });
    figures.push(histogram("Scores", [scores("winners", WINNER_SCORE), scores("losers", LOSER_SCORE)]));
    figures.push(histogram("Gaps", [{ name: "", values: stage.rows.map(gap) }]));
  }
  byId("about").replaceChildren(make("div", {}, ...lines.map((line) => make("p", {}, line))), ...figures);
};

const card = (i) => {
  const row = rows[i], [width, height] = sizeOf(row), better = ratings.get(stage, row);
  const picture = (which, title, score) => make("span", { class: "picture" },
    make("img", { src: pictureOf(row, which), alt: title, width, height, loading: "lazy", decoding: "async" }),
    title, ...(score === undefined || !stage.scored ? [] : [" ", make("b", {}, shown(score))]));
  const pictures = row[PHOTOGRAPH] ? [picture(PHOTOGRAPH, "photograph")] : [];
  pictures.push(picture(WINNER, "winner", row[WINNER_SCORE]), picture(LOSER, "loser", row[LOSER_SCORE]));
  const about = [row[ID], stage.scored ? `gap ${shown(gap(row))}` : "", howWon(row)].filter(Boolean);
  const small = make("small", {}, ...about.map((text) => make("span", {}, text)));
  if (better) small.append(make("span", { class: `rated ${better}` }, WORDS[better]));
  const kind = Math.max(width, height) <= 256 ? "card small" : "card";
  return button({ class: kind }, () => open(i),
    make("span", { class: "pictures" }, ...pictures), make("span", { class: "caption" }, row[CAPTION]), small);
};

const append = (until) => {
  const end = Math.min(rows.length, until);
  const added = [];
  for (let i = cards.length; i < end; i++) added.push(card(i));
  cards.push(...added);
  list.append(...added);
};

const redraw = (i) => {
  if (i >= cards.length) return;
  const fresh = card(i);
  cards[i].replaceWith(fresh);
  cards[i] = fresh;
};

// The pairs that are asked for, in their order.
const select = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  rows = stage.rows.filter((row) => {
    if (split.value && !row[SPLIT].startsWith(split.value + "_")) return false;
    if (rated.value && (rated.value === "yes") !== Boolean(ratings.get(stage, row))) return false;
    const text = words.length ? `${row[CAPTION]} ${row[ID]}`.toLowerCase() : "";
    return words.every((word) => text.includes(word));
  });
  const [by, way] = order.value.split(" ");
  const value = { gap, score: (row) => row[WINNER_SCORE], name: (row) => row[ID] }[by];
  const sign = way === "down" ? -1 : 1;
  if (value) rows.sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0));
  else shuffle(rows, Math.random);
  byId("shuffle").hidden = Boolean(value);
  list.replaceChildren();
  cards = [];
  append(AT_ONCE);
  const all = rows.length === stage.rows.length;
  document.querySelector(".count").textContent = all ? count(rows.length, "pair") : `${rows.length} of ${count(stage.rows.length, "pair")}`;
};

const showStage = () => {
  const asked = decodeURIComponent(location.hash.slice(1));
  stage = data.stages.find(({ name }) => name === asked) ?? data.stages[0];
  document.querySelector("nav").replaceChildren(...data.stages.map((each) => make(
    "a", { href: "#" + encodeURIComponent(each.name), "aria-current": each === stage && "page" }, each.title)));
  const row = stage.rows[0], width = row ? sizeOf(row)[0] : 192;
  const side = width <= 256 ? width * Math.max(1, Math.floor(200 / width)) : 192;
  const each = stage.rows.some((one) => one[PHOTOGRAPH]) ? 3 : 2;
  list.style.setProperty("--side", side + "px");
  list.style.setProperty("--card", each * side + 4 * (each - 1) + "px");
  order.value = stage.scored ? "gap down" : "name up";
  about();
  select();
};

// One pair at a time.
let at = 0, hidden = false, series = false; // series: the photograph and its reconstructions instead of the pair
const viewer = new Viewer(dialog.firstElementChild, () => dialog.close());

const open = (i) => {
  at = i;
  dialog.showModal();
  show();
};

const go = (by) => {
  if (!(at + by in rows)) return;
  at += by;
  show();
};

const rate = (better) => {
  const row = rows[at];
  ratings.set(stage, row, ratings.get(stage, row) === better ? "" : better);
  redraw(at);
  if (ratings.get(stage, row) && at + 1 in rows) at++;
  show();
};

const show = () => {
  const row = rows[at], better = ratings.get(stage, row);
  // Where it is hidden which won, the winner is on the left or on the right by lot.
  const turned = hidden && parseInt(row[HASH][0], 16) % 2;
  const [left, right] = turned ? ["loser", "winner"] : ["winner", "loser"];
  const title = (which, side) => {
    if (hidden) return side;
    const score = row[which === "winner" ? WINNER_SCORE : LOSER_SCORE];
    return `${side} · ${which}${stage.scored ? " " + shown(score) : ""}`;
  };
  const picture = (which, side) => ({ source: pictureOf(row, which === "winner" ? WINNER : LOSER),
    title: title(which, side), chosen: better === which, act: () => rate(which) });
  const won = (strength) => (!hidden && strength === row[NUMBER] ? ` · winner ${shown(row[WINNER_SCORE])}` : "");
  const drawn = row[RECONSTRUCTIONS].map((name, i) => (
    { source: "pictures/" + name, title: `t${stage.strengths[i]}${won(stage.strengths[i])}` }));
  const photograph = row[PHOTOGRAPH] ? [{ source: pictureOf(row, PHOTOGRAPH), title: "photograph" }] : [];
  const apart = series && drawn.length;
  const pictures = apart ? [...photograph, ...drawn] : [picture(left, "A"), picture(right, "B"), ...photograph];
  const answer = (label, key, keys, which) => ({ label, key, keys, chosen: better === which, act: () => rate(which) });
  const facts = [`${at + 1} of ${rows.length}`, row[ID]];
  if (!hidden) facts.push(...[stage.scored ? `gap ${shown(gap(row))}` : "", howWon(row)].filter(Boolean));
  const hide = () => { hidden = !hidden; show(); };
  const turn = () => { series = !series; show(); };
  const redrawn = { label: `t${stage.strengths[0]} to t${stage.strengths.at(-1)}`, key: "t", keys: ["t"], act: turn, chosen: Boolean(apart) };
  viewer.show({
    place: facts.join(" · "), text: row[CAPTION], size: sizeOf(row), question: "", pictures,
    answers: apart ? [] : [
      answer("A is better", "←", ["ArrowLeft"], left),
      answer("Equal", "=", ["=", "e"], "equal"),
      answer("Drop", "x", ["x", "Delete"], "neither"),
      answer("B is better", "→", ["ArrowRight"], right),
    ],
    moves: [
      { label: "Previous", key: "↑", keys: ["ArrowUp", "p"], act: () => go(-1), off: !(at - 1 in rows) },
      { label: "Hide winner", key: "h", keys: ["h"], act: hide, chosen: hidden },
      ...(drawn.length ? [redrawn] : []),
      { label: "Next", key: "↓", keys: ["ArrowDown", "n"], act: () => go(1), off: !(at + 1 in rows) },
    ],
  });
  for (const next of [rows[at + 1], rows[at + 2]]) if (next) new Image().src = pictureOf(next, WINNER);
};

dialog.addEventListener("close", () => {
  const shownRow = rows[at];
  about();
  if (rated.value) select();
  at = Math.max(0, rows.indexOf(shownRow));
  append(at + 1);
  cards[at]?.focus();
});
list.addEventListener("keydown", (event) => {
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const i = cards.indexOf(document.activeElement) + (by ?? 0);
  if (!by || !(i in rows)) return;
  event.preventDefault();
  append(i + 1);
  cards[i].focus();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || dialog.open || document.activeElement === search) return;
  event.preventDefault();
  search.focus();
});
search.addEventListener("input", select);
for (const control of [order, split, rated]) control.addEventListener("change", select);
byId("shuffle").addEventListener("click", select);
byId("save").addEventListener("click", () => save("ratings.json", ratings.file()));
byId("rate").addEventListener("click", () => {
  const first = rows.findIndex((row) => !ratings.get(stage, row));
  if (rows.length) open(Math.max(0, first));
});
const observer = new IntersectionObserver(([entry]) => {
  if (!entry.isIntersecting || cards.length === rows.length) return;
  append(cards.length + AT_ONCE);
  observer.unobserve(more); // so that it says again whether the end is near
  observer.observe(more);
}, { rootMargin: "1500px" });
observer.observe(more);
document.title = `Pairs of ${data.run}`;
addEventListener("hashchange", showStage);
showStage();
