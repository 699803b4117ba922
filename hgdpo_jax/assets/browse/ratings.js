// Ratings: which picture of a pair is better. This browser keeps them, pair by pair; one file holds those of all stages.

// What a row holds.
const [ID, CAPTION, SPLIT, WINNER, LOSER, PHOTOGRAPH, WINNER_SCORE, LOSER_SCORE, NUMBER, HASH, RATED,
  RECONSTRUCTIONS] = Array(12).keys();
const placeOf = (stage) => `hgdpo ratings ${stage.key} ${stage.name}`;

class Ratings {
  constructor(stages) {
    this.of = new Map(stages.map((stage) => [stage, kept(placeOf(stage))]));
  }

  // "winner", "loser", "equal", "neither", or "" where nobody has rated it.
  get(stage, row) {
    return this.of.get(stage)[row[HASH]] ?? row[RATED];
  }

  set(stage, row, better) {
    this.of.get(stage)[row[HASH]] = better;
    keep(placeOf(stage), this.of.get(stage));
  }

  counts(stage) {
    const found = { winner: 0, loser: 0, equal: 0, neither: 0 };
    for (const row of stage.rows) {
      const better = this.get(stage, row);
      if (better) found[better]++;
    }
    return found;
  }

  // Whether they are others than those that `pairs` has taken.
  changed(stage) {
    return stage.rows.some((row) => this.get(stage, row) !== row[RATED]);
  }

  // The file that `pairs` takes.
  file() {
    const stages = {};
    for (const stage of this.of.keys()) {
      const rated = stage.rows.filter((row) => this.get(stage, row));
      const before = stage.rows.some((row) => row[RATED]);
      if (rated.length || before) {
        const entry = (row) => [row[ID], { pair: row[HASH], better: this.get(stage, row) }];
        stages[stage.name] = Object.fromEntries(rated.map(entry));
      }
    }
    return { hgdpo_jax: "ratings", stages };
  }
}
