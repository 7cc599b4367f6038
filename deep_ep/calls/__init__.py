"""One file a call: validate -> plan -> launch -> wrap."""
