;; A WASI preview 2 component, by hand: prints the file it is given, then tries to change it.
;;
;;     ipfsfuse-run reader-p2.wat /ipfs/CID/path
;;
;; Exit code 0: it read the file, and each try to change something was refused with `not-permitted`.
(component
  (import "wasi:io/error@0.2.0" (instance $error
    (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error-type))

  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $stream (sub resource)))
    (alias outer 1 $error-type (type $error-outer))
    (export "error" (type $error (eq $error-outer)))
    (type $stream-error-is (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-is)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream-type))

  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $stream-type (type $stream-outer))
    (export "output-stream" (type $stream (eq $stream-outer)))
    (export "get-stdout" (func (result (own $stream))))))

  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-arguments" (func (result (list string))))))

  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $descriptor (sub resource)))
    (type $code-is (enum
      "access" "would-block" "already" "bad-descriptor" "busy" "deadlock" "quota" "exist" "file-too-large" "illegal-byte-sequence"
      "in-progress" "interrupted" "invalid" "io" "is-directory" "loop" "too-many-links" "message-size" "name-too-long" "no-device"
      "no-entry" "no-lock" "insufficient-memory" "insufficient-space" "not-directory" "not-empty" "not-recoverable" "unsupported"
      "no-tty" "no-such-device" "overflow" "not-permitted" "pipe" "read-only" "invalid-seek" "text-file-busy" "cross-device"))
    (export "error-code" (type $code (eq $code-is)))
    (type $path-flags-is (flags "symlink-follow"))
    (export "path-flags" (type $path-flags (eq $path-flags-is)))
    (type $open-flags-is (flags "create" "directory" "exclusive" "truncate"))
    (export "open-flags" (type $open-flags (eq $open-flags-is)))
    (type $flags-is (flags "read" "write" "file-integrity-sync" "data-integrity-sync" "requested-write-sync" "mutate-directory"))
    (export "descriptor-flags" (type $flags (eq $flags-is)))
    (export "[method]descriptor.open-at"
      (func (param "self" (borrow $descriptor)) (param "path-flags" $path-flags) (param "path" string)
        (param "open-flags" $open-flags) (param "flags" $flags) (result (result (own $descriptor) (error $code)))))
    (export "[method]descriptor.read"
      (func (param "self" (borrow $descriptor)) (param "length" u64) (param "offset" u64)
        (result (result (tuple (list u8) bool) (error $code)))))
    (export "[method]descriptor.unlink-file-at"
      (func (param "self" (borrow $descriptor)) (param "path" string) (result (result (error $code)))))
    (export "[method]descriptor.create-directory-at"
      (func (param "self" (borrow $descriptor)) (param "path" string) (result (result (error $code)))))))
  (alias export $types "descriptor" (type $descriptor-type))

  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor-type (type $descriptor-outer))
    (export "descriptor" (type $descriptor (eq $descriptor-outer)))
    (export "get-directories" (func (result (list (tuple (own $descriptor) string)))))))

  ;; The memory, and where the host puts what it returns: from 4096 on, anew with each call to $forget.
  (core module $Memory
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "keep") (result i32) (global.get $top))
    (func (export "forget") (param i32) (global.set $top (local.get 0))))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias core export $memory "realloc" (core func $realloc))

  (alias export $streams "[method]output-stream.blocking-write-and-flush" (func $write-at-host))
  (core func $write (canon lower (func $write-at-host) (memory $mem)))
  (alias export $stdout "get-stdout" (func $get-stdout-at-host))
  (core func $get-stdout (canon lower (func $get-stdout-at-host)))
  (alias export $environment "get-arguments" (func $get-arguments-at-host))
  (core func $get-arguments (canon lower (func $get-arguments-at-host) (memory $mem) (realloc $realloc)))
  (alias export $preopens "get-directories" (func $get-directories-at-host))
  (core func $get-directories (canon lower (func $get-directories-at-host) (memory $mem) (realloc $realloc)))
  (alias export $types "[method]descriptor.open-at" (func $open-at-at-host))
  (core func $open-at (canon lower (func $open-at-at-host) (memory $mem)))
  (alias export $types "[method]descriptor.read" (func $read-at-host))
  (core func $read (canon lower (func $read-at-host) (memory $mem) (realloc $realloc)))
  (alias export $types "[method]descriptor.unlink-file-at" (func $unlink-file-at-at-host))
  (core func $unlink-file-at (canon lower (func $unlink-file-at-at-host) (memory $mem)))
  (alias export $types "[method]descriptor.create-directory-at" (func $create-directory-at-at-host))
  (core func $create-directory-at (canon lower (func $create-directory-at-at-host) (memory $mem)))

  (core module $Main
    (import "memory" "memory" (memory 4))
    (import "memory" "keep" (func $keep (result i32)))
    (import "memory" "forget" (func $forget (param i32)))
    (import "wasi" "write" (func $write (param i32 i32 i32 i32)))
    (import "wasi" "get-stdout" (func $get-stdout (result i32)))
    (import "wasi" "get-arguments" (func $get-arguments (param i32)))
    (import "wasi" "get-directories" (func $get-directories (param i32)))
    (import "wasi" "open-at" (func $open-at (param i32 i32 i32 i32 i32 i32 i32)))
    (import "wasi" "read" (func $read (param i32 i64 i64 i32)))
    (import "wasi" "unlink-file-at" (func $unlink-file-at (param i32 i32 i32 i32)))
    (import "wasi" "create-directory-at" (func $create-directory-at (param i32 i32 i32 i32)))

    ;; 0: results; 256: texts
    (data (i32.const 256) "reader-p2: open it for writing: ")
    (data (i32.const 288) "reader-p2: remove it: ")
    (data (i32.const 320) "reader-p2: make a folder beside: ")
    (data (i32.const 384) "Operation not permitted\n")
    (data (i32.const 416) "something else: that is wrong\n")
    (data (i32.const 448) "reader-p2: give me a file below /ipfs/\n")
    (data (i32.const 496) "reader-p2: that file can't be read\n")
    (global $out (mut i32) (i32.const 0))
    (global $failed (mut i32) (i32.const 0))

    (func $print (param $at i32) (param $length i32)
      (call $write (global.get $out) (local.get $at) (local.get $length) (i32.const 16)))

    (func $fail (param $at i32) (param $length i32) (result i32)
      (call $print (local.get $at) (local.get $length))
      (i32.const 1))

    ;; says how a try to change something ended: its result<_, error-code> lies at 0, the code at $code
    (func $refused (param $code i32)
      (if (i32.and (i32.load8_u (i32.const 0)) (i32.eq (i32.load8_u (local.get $code)) (i32.const 31)))
        (then (call $print (i32.const 384) (i32.const 24)))
        (else
          (call $print (i32.const 416) (i32.const 30))
          (global.set $failed (i32.const 1)))))

    ;; the preopen whose name has 5 bytes, of which the last four are "ipfs"; 0 where there is none
    (func $find-ipfs (result i32)
      (local $at i32) (local $left i32)
      (call $get-directories (i32.const 0))
      (local.set $at (i32.load (i32.const 0)))
      (local.set $left (i32.load (i32.const 4)))
      (loop $next
        (if (i32.eqz (local.get $left))
          (then (return (i32.const 0))))
        (if (i32.eq (i32.load offset=8 (local.get $at)) (i32.const 5))
          (then
            (if (i32.eq (i32.load offset=1 (i32.load offset=4 (local.get $at))) (i32.const 0x73667069))
              (then (return (i32.load (local.get $at)))))))
        (local.set $at (i32.add (local.get $at) (i32.const 12)))
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (br $next))
      (unreachable))

    (func $print-file (param $file i32) (result i32)
      (local $offset i64) (local $kept i32)
      (local.set $kept (call $keep))
      (loop $next
        (call $read (local.get $file) (i64.const 4096) (local.get $offset) (i32.const 0))
        (if (i32.load8_u (i32.const 0))
          (then (return (call $fail (i32.const 496) (i32.const 35)))))
        (if (i32.load (i32.const 8))
          (then
            (local.set $offset (i64.add (local.get $offset) (i64.extend_i32_u (i32.load (i32.const 8)))))
            (call $print (i32.load (i32.const 4)) (i32.load (i32.const 8)))
            (call $forget (local.get $kept))
            (br $next))))
      (i32.const 0))

    (func (export "run") (result i32)
      (local $ipfs i32) (local $path i32) (local $size i32)
      (global.set $out (call $get-stdout))
      (call $get-arguments (i32.const 0))
      (if (i32.ne (i32.load (i32.const 4)) (i32.const 2))
        (then (return (call $fail (i32.const 448) (i32.const 39)))))
      (local.set $path (i32.add (i32.load offset=8 (i32.load (i32.const 0))) (i32.const 6))) ;; behind "/ipfs/"
      (local.set $size (i32.sub (i32.load offset=12 (i32.load (i32.const 0))) (i32.const 6)))
      (local.set $ipfs (call $find-ipfs))
      (if (i32.or (i32.eqz (local.get $ipfs)) (i32.le_s (local.get $size) (i32.const 0)))
        (then (return (call $fail (i32.const 448) (i32.const 39)))))
      ;; descriptor-flags: 1 is read, 2 is write
      (call $open-at (local.get $ipfs) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i32.const 1) (i32.const 0))
      (if (i32.load8_u (i32.const 0))
        (then (return (call $fail (i32.const 496) (i32.const 35)))))
      (if (call $print-file (i32.load (i32.const 4)))
        (then (return (i32.const 1))))
      (call $print (i32.const 256) (i32.const 32))
      (call $open-at (local.get $ipfs) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i32.const 2) (i32.const 0))
      (call $refused (i32.const 4))
      (call $print (i32.const 288) (i32.const 22))
      (call $unlink-file-at (local.get $ipfs) (local.get $path) (local.get $size) (i32.const 0))
      (call $refused (i32.const 1))
      (call $print (i32.const 320) (i32.const 33))
      (i32.store8 (i32.add (local.get $path) (i32.sub (local.get $size) (i32.const 1))) (i32.const 0x7e)) ;; its name, ending in "~"
      (call $create-directory-at (local.get $ipfs) (local.get $path) (local.get $size) (i32.const 0))
      (call $refused (i32.const 1))
      (global.get $failed)))

  (core instance $main (instantiate $Main
    (with "memory" (instance $memory))
    (with "wasi" (instance
      (export "write" (func $write))
      (export "get-stdout" (func $get-stdout))
      (export "get-arguments" (func $get-arguments))
      (export "get-directories" (func $get-directories))
      (export "open-at" (func $open-at))
      (export "read" (func $read))
      (export "unlink-file-at" (func $unlink-file-at))
      (export "create-directory-at" (func $create-directory-at))))))

  (alias core export $main "run" (core func $run-core))
  (func $run (result (result)) (canon lift (core func $run-core)))
  (instance $run-interface (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $run-interface)))
