// How the search of the site ranks and describes what it finds. build.py writes three tables above these lines:
// PROMISES: page to its one-line promise; HOMES: public name to the chapter that defines it; NAMES: address to its summary.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,

  // The chapter of a name that was asked for comes first, then its entry in the reference.
  score(result) {
    const [page, , anchor, , score] = result;
    const asked = new URLSearchParams(location.search).get("q").trim();
    result[3] = NAMES[page + anchor] || PROMISES[page] || null;
    if (HOMES[asked] === page) return score + 1000;
    return anchor && NAMES[page + anchor] && HOMES[asked] ? score + 100 : score;
  },
};
