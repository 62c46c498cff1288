// `props.value` becomes the chosen file: its name, and its bytes in base64. It leaves the browser
// with the event that has it as an input. `props.most` is how many bytes it may have.
const input = element.querySelector("input");
const said = element.querySelector("p");
let reading = null;
input.addEventListener("change", () => {
  const file = input.files[0];
  // Not null: Gradio would make "" of it and tell the watcher below, which empties the field.
  props.value = "";
  reading = null;
  said.textContent = "";
  if (!file) return;
  if (file.size > props.most) {
    input.value = "";
    said.textContent = `${file.name} is longer than ${props.most / 2 ** 20} MiB, the most the page takes; the API and the command line take more.`;
    return;
  }
  said.textContent = "Reading the file…";
  const reader = reading = new FileReader();
  reader.onload = () => {
    if (reading !== reader) return;  // another was chosen meanwhile
    props.value = { name: file.name, data: reader.result.split(",")[1] || "" };
    said.textContent = `Read: ${(file.size / 2 ** 10).toFixed(1)} KiB.`;
  };
  reader.onerror = () => { said.textContent = `${file.name} cannot be read: ${reader.error.message}`; };
  reader.readAsDataURL(file);
});
watch("value", () => {
  if (props.value) return;
  input.value = "";
  said.textContent = "";
});
