// Histograms as SVG.

const SVG = "http://www.w3.org/2000/svg";

const drawn = (tag, attributes) => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

const median = (values) => {
  const sorted = Float64Array.from(values).sort(), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

// A figure of one or two series: [{name, values}], in bins from the lowest to the highest value of all.
const histogram = (title, series) => {
  let [low, high] = [Infinity, -Infinity];
  for (const { values } of series) for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const bins = Math.min(40, Math.max(8, Math.ceil(2 * Math.sqrt(series[0].values.length))));
  const width = (high - low) / bins || 1;
  const counts = series.map(({ values }) => {
    const found = new Array(bins).fill(0);
    for (const value of values) found[Math.min(bins - 1, Math.floor((value - low) / width))]++;
    return found;
  });
  const most = Math.max(...counts.flat());
  const words = series.map(({ name, values }) => `${name} median ${shown(median(values))}`.trim()).join(", ");
  const chart = drawn("svg", { class: "histogram", viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", role: "img" });
  chart.setAttribute("aria-label", `${title}: ${words}, from ${shown(low)} to ${shown(high)}`);
  counts.forEach((found, i) => found.forEach((n, bin) => {
    const height = (100 * n) / most, kind = (i ? "two" : "one") + (series.length > 1 ? " both" : "");
    if (n) chart.append(drawn("rect", { class: kind, x: bin + 0.06, y: 100 - height, width: 0.88, height }));
  }));
  const dots = series.map(({ name }, i) => [make("i", { class: `dot ${i ? "two" : "one"}` }), name]);
  const ends = make("div", { class: "ends" }, make("span", {}, shown(low)), make("span", {}, shown(high)));
  const legend = series.length > 1 ? dots.flat() : [words];
  return make("figure", {}, chart, ends, make("figcaption", {}, `${title}: `, ...legend));
};
