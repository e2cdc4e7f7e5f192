// The commands and programs that give what is shown.

/**
 * {title, code} each. `shown` is {url, sequence, include, threshold, separation, withKey} and the model’s {slug, name,
 * synthetic, precision, backend}.
 */
export function snippets(shown) {
  return [
    { title: "curl", code: curl(shown) },
    { title: "Python, requests", code: withRequests(shown) },
    { title: "Python, this library", code: withLibrary(shown) },
  ];
}

function curl({ url, sequence, include, withKey }) {
  const body = JSON.stringify({ params: { include }, items: [{ sequence }] });
  return [
    `curl -sS ${shell(url)}`,
    "-H 'Content-Type: application/json'",
    ...(withKey ? ['-H "Authorization: Token $NUMPYESM_API_KEY"'] : []),
    `--data-binary ${shell(body)}`,
  ].join(" \\\n  ") + "\n";
}

/** One word of a POSIX shell, whatever is in it. */
function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function withRequests({ url, sequence, include, withKey, ...shown }) {
  const headers = withKey ? `\n    headers={"Authorization": f"Token {os.environ['NUMPYESM_API_KEY']}"},` : "";
  return `${withKey ? "import os\n\n" : ""}import numpy as np
import requests

sequence = ${python(sequence)}

response = requests.post(
    ${python(url)},${headers}
    json={"params": {"include": ${python(include)}}, "items": [{"sequence": sequence}]},
    timeout=600,
)
response.raise_for_status()
result = {name: np.array(value) for name, value in response.json()["results"][0].items()}
${analysis(include, shown)}`;
}

function withLibrary({ slug, name, source, sequence, include, synthetic, precision, backend, ...shown }) {
  const from = synthetic ? source ?? `synthetic:${name}` : name === "custom" ? slug : name;
  const remark = synthetic
    ? "# Synthetic weights, as on the server: random numbers that mean nothing."
    : "# A name, or the path of your weights.";
  return `import numpy as np
from numpyesm import ESM2

sequence = ${python(sequence)}

${remark}
model = ESM2.from_pretrained(${python(from)}, backend=${python(backend)}, precision=${python(precision)})
result = vars(model.encode([sequence], include=${python(include)})[0])
${analysis(include, shown)}`;
}

/** Both programs end alike: with what the figures show. */
function analysis(include, { threshold, separation }) {
  const parts = [];
  if (include.includes("contacts")) {
    parts.push(`
# Predicted contacts, strongest first; positions count from 1.
contacts = result["contacts"].astype(np.float32)  # residues x residues
i, j = np.triu_indices(len(sequence), k=${separation})
keep = contacts[i, j] >= np.float32(${threshold})
pairs = sorted(zip(i[keep], j[keep]), key=lambda pair: -contacts[pair])
print(len(pairs), "contacts")
for a, b in pairs[:20]:
    print(f"{sequence[a]}{a + 1} - {sequence[b]}{b + 1}: {contacts[a, b]:.3f}")
`);
  }
  if (include.includes("logits")) {
    parts.push(`
# Log-odds of every amino acid against the residue that is there (NaN where that is none of the 20).
vocabulary = list("LAGVSERTIDPKQNFYMHWC")
logits = result["logits"].astype(float)  # residues x 20
log_probability = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
scores = np.full_like(logits, np.nan)
for position, letter in enumerate(sequence):
    if letter in vocabulary:
        scores[position] = log_probability[position] - log_probability[position, vocabulary.index(letter)]
if np.isfinite(scores).any():
    position, column = np.unravel_index(np.nanargmin(scores), scores.shape)
    print(f"worst mutation: {sequence[position]}{position + 1}{vocabulary[column]}, {scores[position, column]:.3f}")
`);
  }
  parts.push(`
# Mean attention that each residue gets in each layer.
attentions = result["attentions"]  # layers x residues
layer, position = np.unravel_index(attentions.argmax(), attentions.shape)
print(f"most attention: {sequence[position]}{position + 1} in layer {layer + 1}, {attentions[layer, position]:.4f}")
`);
  return parts.join("");
}

/** A Python literal of a string or a list of strings. JSON's escapes are Python's. */
function python(value) {
  return Array.isArray(value) ? `[${value.map(python).join(", ")}]` : JSON.stringify(value);
}
