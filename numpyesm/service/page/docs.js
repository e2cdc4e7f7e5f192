// Puts the address and the first model of this service into the commands of the page.

const { models } = await (await fetch("/api/v3/models/")).json();
for (const block of document.querySelectorAll("pre")) {
  block.textContent = block.textContent
    .replaceAll("http://127.0.0.1:8000", location.origin)
    .replaceAll("esm2-35m", models[0].slug);
}
document.querySelector("#models").textContent = models
  .map(({ slug, name, actions }) => `${slug} (${name}): ${actions.join(", ")}`)
  .join("; ");
