"use strict";
const KINDS = {
  agree: { name: "agree", sign: "✓", means: "reference and report say the same: positive or uncertain in both, or negative in both" },
  missed: { name: "missed", sign: "○", means: "positive or uncertain in the reference, not mentioned in the report" },
  invented: { name: "invented", sign: "✚", means: "positive or uncertain in the report, not mentioned in the reference" },
  polarity: { name: "wrong polarity", sign: "⇄", means: "positive or uncertain in one, negative in the other" },
  aside: { name: "said by one", sign: "·", means: "negative in one, not mentioned in the other: not counted as an error" },
};
const ERRORS = ["agree", "missed", "invented", "polarity"];
const SAYS = { "+": "positive", "-": "negative", "?": "uncertain", ".": "not mentioned" };

// How one label of a report stands to the reference's; null where neither says anything.
function verdict(reference, report) {
  const sign = (letter) => letter === "-" ? -1 : letter === "." ? 0 : 1;
  const wanted = sign(reference), said = sign(report);
  if (!wanted && !said) return null;
  if (wanted === said) return "agree";
  if (wanted && said) return "polarity";
  if (wanted > 0) return "missed";
  return said > 0 ? "invented" : "aside";
}

// A report without labels (malformed, or nothing to read) says nothing.
const labelsOf = (sample) => sample.labels || ".".repeat(DATA.observations.length);

// observation -> kind, for the observations that either side mentions; {} without reference labels.
function verdicts(card, sample) {
  const kinds = {};
  if (!card.said) return kinds;
  const said = labelsOf(sample);
  DATA.observations.forEach((name, i) => {
    const kind = verdict(card.said[i], said[i]);
    if (kind) kinds[name] = kind;
  });
  return kinds;
}

function badge(kind) {
  return make("span", { class: `badge ${kind}` }, make("span", { "aria-hidden": "true" }, KINDS[kind].sign), ` ${KINDS[kind].name}`);
}

function rewards(sample) {
  const terms = Object.entries(sample.terms).map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value.toFixed(2))));
  return make("p", { class: "rewards" }, make("span", { class: "total" }, "reward ", make("b", {}, sample.total.toFixed(2))), terms,
    sample.tokens ? make("span", {}, `${sample.tokens} tokens`) : null);
}

function pane(title, sample, card, thinkOpen) {
  const flags = [];
  if (sample.report === null) flags.push("malformed: no report that could be labelled");
  if (sample.ended === false) flags.push("cut off at the length limit");
  return make("section", { class: "pane" }, make("h4", {}, title),
    flags.map((flag) => make("p", { class: "flag" }, flag)),
    sample.think ? make("details", { class: "think", open: thinkOpen }, make("summary", {}, "think"), make("p", { class: "text" }, sample.think)) : null,
    sample.report === null ? null : make("p", { class: "text report" }, marked(sample.report, verdicts(card, sample))),
    sample.raw ? make("details", { class: "raw", open: sample.report === null }, make("summary", {}, "as sampled, tags and all"), make("p", { class: "text" }, sample.raw)) : null,
    rewards(sample));
}

function findings(card, columns) {
  const rows = DATA.observations.map((name, i) => {
    const letters = [card.said ? card.said[i] : ".", ...columns.map(([, sample]) => labelsOf(sample)[i])];
    if (letters.every((letter) => letter === ".")) return null;
    return make("tr", {}, make("th", { scope: "row" }, name),
      card.drawn ? make("td", { class: "drawn" }, SAYS[card.drawn[i]] === "not mentioned" ? "–" : card.drawn[i] === "+" ? "drawn" : "absent") : null,
      card.said ? make("td", {}, SAYS[card.said[i]]) : null,
      columns.map(([, sample], c) => {
        const kind = card.said ? verdict(card.said[i], letters[c + 1]) : null;
        return make("td", {}, SAYS[letters[c + 1]], kind ? make("br") : null, kind ? badge(kind) : null);
      }));
  }).filter(Boolean);
  if (!rows.length) return make("p", { class: "hint" }, "No observation is mentioned on either side.");
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Findings" }, make("table", { class: "findings" },
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "finding"),
      card.drawn ? make("th", { scope: "col" }, "image") : null, card.said ? make("th", { scope: "col" }, "reference") : null,
      columns.map(([title]) => make("th", { scope: "col" }, title)))),
    make("tbody", {}, rows)));
}

const PICTURES = [];
function radiographs(card) {
  if (!PICTURES.length) PICTURES.push(...JSON.parse(document.getElementById("pictures").textContent));
  if (!card.images.length) return make("div", { class: "radiographs none" }, make("p", { class: "hint" }, "The radiograph is not on this page."));
  return make("div", { class: "radiographs" }, card.images.map((place, i) => {
    const view = (card.views || [])[i] || "";
    const large = (event) => event.currentTarget.setAttribute("aria-pressed", String(event.currentTarget.getAttribute("aria-pressed") !== "true"));
    return make("figure", {}, make("button", { type: "button", "aria-pressed": "false", title: "larger or smaller", onclick: large },
      make("img", { src: PICTURES[place], alt: `${view} radiograph of study ${card.id}`.trim() })), view ? make("figcaption", {}, view) : null);
  }));
}

// A card: two moments stand side by side, more have a slider. `state` keeps what was chosen: {at, member, think}.
function renderCard(card, state) {
  const body = make("div", { class: "body" });
  const slider = card.at.length > 2 || (card.at.length > 1 && card.at.some((version) => version.samples.length > 1));
  state.at = Math.min(state.at ?? card.at.length - 1, card.at.length - 1);
  const controls = make("div", { class: "moments" });

  function refresh() {
    const version = card.at[state.at];
    const member = Math.min(state.member || 0, version.samples.length - 1);
    const columns = slider || card.at.length === 1 ? [[version.name, version.samples[member]]] : card.at.map((each) => [each.name, each.samples[0]]);
    if (version.samples.length > 1) columns[0][0] += `, sample ${member + 1} of ${version.samples.length}`;
    const group = version.samples.length < 2 ? null : make("div", { class: "samples", role: "group", "aria-label": "Samples of the group, each with its reward" },
      make("span", { class: "hint" }, "rewards of the samples"), version.samples.map((sample, g) => make("button", {
        type: "button", "aria-pressed": String(g === member), onclick: () => { state.member = g; refresh(); body.querySelector('.samples [aria-pressed="true"]').focus(); },
      }, sample.total.toFixed(2))));
    const reference = make("section", { class: "pane reference" }, make("h4", {}, "Reference"),
      card.indication ? make("p", { class: "hint" }, `Indication: ${card.indication}`) : null,
      card.ref === null ? make("p", { class: "hint" }, "not in the manifest") : make("p", { class: "text report" }, marked(card.ref, verdicts(card, columns.at(-1)[1]))));
    body.replaceChildren(...[group, make("div", { class: `panes of-${columns.length + 1}` }, reference, columns.map(([title, sample]) => pane(title, sample, card, state.think))),
      card.said ? null : make("p", { class: "hint" }, "The reference's labels are not known, so that no finding can be compared."), findings(card, columns)].filter(Boolean));
  }

  if (slider) {
    const output = make("output", {}, card.at[state.at].name);
    const rewardsAt = card.at.map((version) => version.samples.reduce((sum, sample) => sum + sample.total, 0) / version.samples.length);
    const mean = make("span", { class: "hint" }, `mean reward ${rewardsAt[state.at].toFixed(2)}`);
    controls.append(make("label", {}, "Moment of the training ", make("input", {
      type: "range", class: "moment", min: 0, max: card.at.length - 1, value: state.at,
      oninput: (event) => {
        state.at = Number(event.target.value);
        output.textContent = card.at[state.at].name;
        mean.textContent = `mean reward ${rewardsAt[state.at].toFixed(2)}`;
        event.target.setAttribute("aria-valuetext", output.textContent);
        refresh();
      },
    })), output, mean);
  }
  refresh();
  return make("div", { class: "card-grid" }, radiographs(card), make("div", { class: "written" }, controls, body));
}
