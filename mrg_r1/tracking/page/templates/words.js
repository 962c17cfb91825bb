"use strict";
// Words that usually speak of an observation. They show the eye where to look; labels come from the labeler and never from here.
const WORDS = {
  "Enlarged Cardiomediastinum": /\b(?:mediastin\w*|cardiomediastin\w*)/gi,
  "Cardiomegaly": /\b(?:cardiomegaly|cardiac (?:silhouette|enlargement|size)|heart(?: size)?|enlarged heart)\b/gi,
  "Lung Opacity": /\b(?:opacit\w*|opacification\w*|infiltrat\w*|airspace disease)\b/gi,
  "Lung Lesion": /\b(?:nodul\w*|mass(?:es)?|lesions?)\b/gi,
  "Edema": /\b(?:o?edema|vascular congestion|pulmonary congestion)\b/gi,
  "Consolidation": /\bconsolidat\w*/gi,
  "Pneumonia": /\b(?:pneumonia\w*|infectio\w*)\b/gi,
  "Atelectasis": /\b(?:atelecta\w*|volume loss|collapse)\b/gi,
  "Pneumothorax": /\bpneumothora\w*/gi,
  "Pleural Effusion": /\b(?:effusions?|pleural fluid|costophrenic angles?)\b/gi,
  "Pleural Other": /\b(?:pleural thickening|pleural scarring|fibrothorax|pleural plaques?)\b/gi,
  "Fracture": /\bfractur\w*/gi,
  "Support Devices": /\b(?:pacemakers?|picc|catheters?|tubes?|lines?|leads?|wires?|devices?|clips?|prosthe\w*|port)\b/gi,
};

// The text as nodes, words of the observations in `kinds` (observation -> kind of agreement) marked.
function marked(text, kinds) {
  const hits = [];
  for (const [name, kind] of Object.entries(kinds)) {
    if (!WORDS[name]) continue;
    for (const match of text.matchAll(WORDS[name])) hits.push([match.index, match.index + match[0].length, name, kind]);
  }
  hits.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  const nodes = [];
  let at = 0;
  for (const [start, end, name, kind] of hits) {
    if (start < at) continue;
    nodes.push(document.createTextNode(text.slice(at, start)));
    nodes.push(make("mark", { class: kind, title: `${name}: ${KINDS[kind].name}` }, text.slice(start, end)));
    at = end;
  }
  nodes.push(document.createTextNode(text.slice(at)));
  return nodes;
}
