"""A component in text form that tries every mutating call of wasi:filesystem, and prints the error code of
each as one byte."""

from pathlib import Path

READER = Path(__file__).parents[2] / "scripts" / "demo_data" / "reader-p2.wat"
"""The demo guest whose imports the component copies."""

NOT_PERMITTED = 31
"""The position of `not-permitted` in wasi:filesystem/types.error-code. The guest prints 255 for success."""

_BORROW = '(param "self" (borrow $descriptor))'
_PATH = '(param "path" string)'
_TIMES = '(param "atim" $new-timestamp) (param "mtim" $new-timestamp)'
_OTHER = '(param "old" string) (param "to" (borrow $descriptor)) (param "new" string)'
_OPEN = (
    '(param "path-flags" $path-flags) (param "path" string) (param "open-flags" $open-flags) (param '
    '"flags" $flags)'
)

# name: (WIT parameters after self, result, core parameters, offset of the error code)
_METHODS = {
    "open-at": (_OPEN, "(own $descriptor)", "i32 i32 i32 i32 i32", 4),
    "set-size": ('(param "size" u64)', "", "i64", 1),
    "set-times": (_TIMES, "", "i32 i64 i32 i32 i64 i32", 1),
    "set-times-at": (
        f'(param "path-flags" $path-flags) {_PATH} {_TIMES}',
        "",
        "i32 i32 i32 i32 i64 i32 i32 i64 i32",
        1,
    ),
    "write": ('(param "buffer" (list u8)) (param "offset" u64)', "u64", "i32 i32 i64", 8),
    "write-via-stream": ('(param "offset" u64)', "(own $stream)", "i64", 4),
    "append-via-stream": ("", "(own $stream)", "", 4),
    "create-directory-at": (_PATH, "", "i32 i32", 1),
    "remove-directory-at": (_PATH, "", "i32 i32", 1),
    "unlink-file-at": (_PATH, "", "i32 i32", 1),
    "rename-at": (_OTHER, "", "i32 i32 i32 i32 i32", 1),
    "link-at": (f'(param "path-flags" $path-flags) {_OTHER}', "", "i32 i32 i32 i32 i32 i32", 1),
    "symlink-at": ('(param "old" string) (param "new" string)', "", "i32 i32 i32 i32", 1),
}

_FILE, _DIR, _NEW = (
    "(i32.const 256) (global.get $file-size)",
    "(i32.const 512) (global.get $dir-size)",
    "(i32.const 768) (global.get $new-size)",
)
_NAME = "(i32.add (i32.const 769) (global.get $dir-size)) (i32.const 3)"
_NOW = "(i32.const 1) (i64.const 0) (i32.const 0)"


def _opening(path: str, open_flags: int, flags: int) -> tuple[str, str]:
    return "open-at", f"(global.get $ipfs) (i32.const 1) {path} (i32.const {open_flags}) (i32.const {flags})"


# name: (method, core arguments); $ipfs is the folder, $fd the file that is open for reading
_TRIES = {
    "open to write": _opening(_FILE, 0, 2),
    "open to read and write": _opening(_FILE, 0, 3),
    "open and create": _opening(_NEW, 1, 1),
    "open and create to write": _opening(_NEW, 1, 2),
    "open and create exclusively": _opening(_NEW, 5, 2),
    "open and truncate": _opening(_FILE, 8, 2),
    "set-size": ("set-size", "(global.get $fd) (i64.const 0)"),
    "set-times": ("set-times", f"(global.get $fd) {_NOW} {_NOW}"),
    "set-times-at": ("set-times-at", f"(global.get $ipfs) (i32.const 1) {_FILE} {_NOW} {_NOW}"),
    "create-directory-at": ("create-directory-at", f"(global.get $ipfs) {_NEW}"),
    "remove-directory-at": ("remove-directory-at", f"(global.get $ipfs) {_DIR}"),
    "unlink-file-at": ("unlink-file-at", f"(global.get $ipfs) {_FILE}"),
    "rename-at": ("rename-at", f"(global.get $ipfs) {_FILE} (global.get $ipfs) {_NEW}"),
    "link-at": ("link-at", f"(global.get $ipfs) (i32.const 0) {_FILE} (global.get $ipfs) {_NEW}"),
    "symlink-at": ("symlink-at", f"(global.get $ipfs) {_FILE} {_NEW}"),
    "write": ("write", "(global.get $fd) (i32.const 256) (i32.const 1) (i64.const 0)"),
    "write-via-stream": ("write-via-stream", "(global.get $fd) (i64.const 0)"),
    "append-via-stream": ("append-via-stream", "(global.get $fd)"),
    "open a directory to change it": _opening(_DIR, 2, 33),
    # the descriptor that the call before stored at 4
    "create in that directory": ("create-directory-at", f"(i32.load (i32.const 4)) {_NAME}"),
}

TRIES = list(_TRIES)
OPENED_TO_CHANGE, SUCCESS = "open a directory to change it", 255
CALLS = [name for name in TRIES if name != OPENED_TO_CHANGE]
"""The calls that fail with NOT_PERMITTED."""


def _core_type(params: str) -> str:
    return f"(param i32 {params} i32)" if params else "(param i32 i32)"


def _types_between(reader: str) -> str:
    """The imports of the demo's reader, with every mutating method in place of its own methods."""
    head, _, rest = reader.partition('    (export "[method]descriptor.open-at"')
    _methods, _, tail = rest.partition('  (alias export $types "descriptor"')
    stamp = """    (type $datetime-is (record (field "seconds" u64) (field "nanoseconds" u32)))
    (export "datetime" (type $datetime (eq $datetime-is)))
    (type $new-timestamp-is (variant (case "no-change") (case "now") (case "timestamp" $datetime)))
    (export "new-timestamp" (type $new-timestamp (eq $new-timestamp-is)))
    (alias outer 1 $stream-type (type $stream-outer))
    (export "output-stream" (type $stream (eq $stream-outer)))
"""
    methods = "\n".join(
        f'    (export "[method]descriptor.{name}" (func {_BORROW} {params} (result (result '
        f"{result} (error $code)))))"
        for name, (params, result, _core, _at) in _METHODS.items()
    )
    imports, _, _code = tail.partition("  ;; The memory")
    return f'{head}{stamp}{methods}))\n  (alias export $types "descriptor"{imports}'


_WORLD = """  (core module $Memory
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.set $top (i32.and (i32.add (global.get $top) (i32.add (local.get 3) (i32.const 15))) (i32.const -8)))
      (i32.and (i32.sub (global.get $top) (local.get 3)) (i32.const -8))))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias core export $memory "realloc" (core func $realloc))
  (alias export $streams "[method]output-stream.blocking-write-and-flush" (func $write-out-at-host))
  (core func $write-out (canon lower (func $write-out-at-host) (memory $mem)))
  (alias export $stdout "get-stdout" (func $get-stdout-at-host))
  (core func $get-stdout (canon lower (func $get-stdout-at-host)))
  (alias export $preopens "get-directories" (func $get-directories-at-host))
  (core func $get-directories (canon lower (func $get-directories-at-host) (memory $mem) (realloc $realloc)))
"""
"""Memory, and the imports by which the guest finds the folder and prints its results."""


def _main(wanted: str, tries: str, file: str, folder: str) -> str:
    return f"""  (core module $Main
    (import "memory" "memory" (memory 1))
    (import "wasi" "write-out" (func $write-out (param i32 i32 i32 i32)))
    (import "wasi" "get-stdout" (func $get-stdout (result i32)))
    (import "wasi" "get-directories" (func $get-directories (param i32)))
{wanted}
    (data (i32.const 256) "{file}")
    (data (i32.const 512) "{folder}")
    (data (i32.const 768) "{folder}/new")
    (global $file-size i32 (i32.const {len(file)}))
    (global $dir-size i32 (i32.const {len(folder)}))
    (global $new-size i32 (i32.const {len(folder) + 4}))
    (global $ipfs (mut i32) (i32.const 0))
    (global $fd (mut i32) (i32.const 0))
    ;; the result of a try is at 0: stores its error code, or 255 for success, at 2048 + the try's number
    (func $note (param $number i32) (param $code i32)
      (i32.store8 (i32.add (i32.const 2048) (local.get $number))
        (select (i32.load8_u (local.get $code)) (i32.const 255) (i32.load8_u (i32.const 0)))))
    (func (export "run") (result i32)
      ;; the preopens are / and /ipfs, in this order
      (call $get-directories (i32.const 0))
      (global.set $ipfs (i32.load offset=12 (i32.load (i32.const 0))))
      (call $open-at (global.get $ipfs) (i32.const 1) {_FILE} (i32.const 0) (i32.const 1) (i32.const 0))
      (if (i32.load8_u (i32.const 0)) (then (return (i32.const 1))))
      (global.set $fd (i32.load (i32.const 4)))
{tries}
      (call $write-out (call $get-stdout) (i32.const 2048) (i32.const {len(_TRIES)}) (i32.const 0))
      (i32.const 0)))
"""


def component(file: str, folder: str) -> str:
    """The text of the guest. The paths are relative to /ipfs."""
    lowered = "\n".join(
        f'  (alias export $types "[method]descriptor.{name}" (func ${name}-at-host))\n'
        f"  (core func ${name} (canon lower (func ${name}-at-host) (memory $mem)))"
        for name in _METHODS
    )
    wanted = "\n".join(
        f'    (import "wasi" "{name}" (func ${name} {_core_type(core)}))'
        for name, (_p, _r, core, _at) in _METHODS.items()
    )
    tries = "\n".join(
        f"      (call ${method} {arguments} (i32.const 0)) (call $note (i32.const {number}) "
        f"(i32.const {_METHODS[method][3]}))"
        for number, (method, arguments) in enumerate(_TRIES.values())
    )
    given = " ".join(
        f'(export "{name}" (func ${name}))'
        for name in [*_METHODS, "write-out", "get-stdout", "get-directories"]
    )
    return f"""{_types_between(READER.read_text())}
{_WORLD}{lowered}
{_main(wanted, tries, file, folder)}  (core instance $main (instantiate $Main (with "memory" (instance $memory)) (with "wasi" (instance {given}))))
  (alias core export $main "run" (core func $run-core))
  (func $run (result (result)) (canon lift (core func $run-core)))
  (instance $run-interface (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $run-interface)))
"""
