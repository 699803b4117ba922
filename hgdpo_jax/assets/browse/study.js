// A study: two pictures whose names and sides nobody sees, and two questions about them.

const QUESTIONS = [["natural", "Which picture looks more natural?"], ["text", "Which picture fits the text better?"]];
const place = `hgdpo study ${data.study}`;
const state = { person: "", answers: {}, ...kept(place) };
if (!state.person) {
  state.person = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  keep(place, state);
}
// Each person has an order of their own, and sides by lot, the same ones when the page is opened again.
const lot = lots(state.person);
const asked = shuffle([...data.pairs.keys()], lot).flatMap((pair) => {
  const turned = lot() < 0.5;
  return QUESTIONS.map(([name, text]) => ({ pair, turned, name, text }));
});
const answerOf = ({ pair, name }) => state.answers[pair]?.[name];
const unanswered = () => asked.findIndex((question) => !answerOf(question));

const dialog = document.querySelector("dialog");
const viewer = new Viewer(dialog.firstElementChild, () => dialog.close());
let at = 0;

const show = () => {
  const { pair, turned, name, text } = asked[at], [caption, first, second] = data.pairs[pair];
  const sides = turned ? [["second", second], ["first", first]] : [["first", first], ["second", second]];
  const answer = (value) => {
    (state.answers[pair] ??= {})[name] = value;
    keep(place, state);
    at = at + 1 in asked ? at + 1 : Math.max(0, unanswered());
    if (unanswered() < 0) dialog.close();
    else show();
  };
  const chosen = answerOf(asked[at]);
  const key = (label, arrow, keys, value) => ({ label, key: arrow, keys, chosen: chosen === value, act: () => answer(value) });
  viewer.show({
    place: `${Math.floor(at / QUESTIONS.length) + 1} of ${data.pairs.length}`,
    text: name === "text" ? caption : "",
    size: data.size,
    question: text,
    pictures: sides.map(([value, source], i) => (
      { source, title: "AB"[i], chosen: chosen === value, act: () => answer(value) })),
    answers: [
      key("A", "←", ["ArrowLeft"], sides[0][0]),
      key("Equal", "=", ["=", "e"], "equal"),
      key("B", "→", ["ArrowRight"], sides[1][0]),
    ],
    moves: [{ label: "Back", key: "↑", keys: ["ArrowUp", "Backspace"], off: at === 0, act: () => { at--; show(); } }],
  });
};

const tell = () => {
  const done = asked.filter(answerOf).length, all = asked.length;
  const task = `You will see ${count(data.pairs.length, "pair")} of pictures. Two questions are asked about each; choose ` +
    "with the mouse, a finger, or the keys ←, = and →. There is no right answer: take what you see first.";
  const thanks = "Thank you. Save the answers, and send the file to who gave you this page.";
  byId("said").textContent = done === all ? thanks : done ? `${done} of ${all} questions are answered.` : task;
  byId("begin").textContent = done === all ? "Look again" : done ? "Go on" : "Begin";
  byId("save").hidden = !done;
};
byId("begin").addEventListener("click", () => {
  at = Math.max(0, unanswered());
  dialog.showModal();
  show();
});
byId("save").addEventListener("click", () => save(`answers-${state.person}.json`,
  { hgdpo_jax: "answers", study: data.study, person: state.person, answers: state.answers }));
dialog.addEventListener("close", () => {
  tell();
  byId(unanswered() < 0 ? "save" : "begin").focus();
});
tell();
