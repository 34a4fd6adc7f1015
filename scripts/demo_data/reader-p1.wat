;; A WASI preview 1 command, by hand: prints the file it is given, then tries to change it.
;;
;;     ipfsfuse-run reader-p1.wat /ipfs/CID/path
;;
;; Exit code 0: it read the file, and each try to change something was refused with 63, "operation not permitted".
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_dir_name" (func $fd_prestat_dir_name (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_unlink_file" (func $path_unlink_file (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_create_directory" (func $path_create_directory (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  ;; 0: results; 16: one iovec; 32: a preopen's name; 256: texts; 4096: pointers to arguments; 8192: the arguments; 65536: the file
  (memory (export "memory") 3)
  (data (i32.const 256) "reader-p1: open it for writing: ")
  (data (i32.const 288) "reader-p1: remove it: ")
  (data (i32.const 320) "reader-p1: make a folder beside: ")
  (data (i32.const 384) "Operation not permitted\n")
  (data (i32.const 416) "something else: that is wrong\n")
  (data (i32.const 448) "reader-p1: give me a file below /ipfs/\n")
  (data (i32.const 496) "reader-p1: that file can't be read\n")

  (func $print (param $at i32) (param $length i32)
    (i32.store (i32.const 16) (local.get $at))
    (i32.store (i32.const 20) (local.get $length))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 0))))

  (func $fail (param $at i32) (param $length i32)
    (call $print (local.get $at) (local.get $length))
    (call $proc_exit (i32.const 1)))

  ;; says how a try to change something ended, and fails unless it was refused
  (func $refused (param $errno i32)
    (if (i32.ne (local.get $errno) (i32.const 63))
      (then (call $fail (i32.const 416) (i32.const 30))))
    (call $print (i32.const 384) (i32.const 24)))

  ;; the preopen whose name has 5 bytes, of which the last four are "ipfs"; -1 where there is none
  (func $find_ipfs (result i32)
    (local $fd i32)
    (local.set $fd (i32.const 3))
    (loop $next
      (if (call $fd_prestat_get (local.get $fd) (i32.const 0))
        (then (return (i32.const -1))))
      (if (i32.eq (i32.load (i32.const 4)) (i32.const 5))
        (then
          (drop (call $fd_prestat_dir_name (local.get $fd) (i32.const 32) (i32.const 5)))
          (if (i32.eq (i32.load (i32.const 33)) (i32.const 0x73667069))
            (then (return (local.get $fd))))))
      (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
      (br $next))
    (unreachable))

  (func $length (param $text i32) (result i32)
    (local $at i32)
    (local.set $at (local.get $text))
    (loop $next
      (if (i32.load8_u (local.get $at))
        (then
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (br $next))))
    (i32.sub (local.get $at) (local.get $text)))

  (func $print_file (param $fd i32)
    (loop $next
      (i32.store (i32.const 16) (i32.const 65536))
      (i32.store (i32.const 20) (i32.const 65536))
      (if (call $fd_read (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 0))
        (then (call $fail (i32.const 496) (i32.const 35))))
      (if (i32.load (i32.const 0))
        (then
          (call $print (i32.const 65536) (i32.load (i32.const 0)))
          (br $next)))))

  (func (export "_start")
    (local $ipfs i32) (local $path i32) (local $size i32)
    (drop (call $args_sizes_get (i32.const 0) (i32.const 4)))
    (if (i32.or (i32.ne (i32.load (i32.const 0)) (i32.const 2)) (i32.gt_u (i32.load (i32.const 4)) (i32.const 4096)))
      (then (call $fail (i32.const 448) (i32.const 39))))
    (drop (call $args_get (i32.const 4096) (i32.const 8192)))
    (local.set $ipfs (call $find_ipfs))
    (local.set $path (i32.add (i32.load (i32.const 4100)) (i32.const 6))) ;; behind "/ipfs/"
    (local.set $size (i32.sub (call $length (i32.load (i32.const 4100))) (i32.const 6)))
    (if (i32.or (i32.lt_s (local.get $ipfs) (i32.const 0)) (i32.le_s (local.get $size) (i32.const 0)))
      (then (call $fail (i32.const 448) (i32.const 39))))
    ;; rights: 2 is fd_read, 64 is fd_write
    (if (call $path_open (local.get $ipfs) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 8))
      (then (call $fail (i32.const 496) (i32.const 35))))
    (call $print_file (i32.load (i32.const 8)))
    (call $print (i32.const 256) (i32.const 32))
    (call $refused (call $path_open (local.get $ipfs) (i32.const 1) (local.get $path) (local.get $size) (i32.const 0) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 8)))
    (call $print (i32.const 288) (i32.const 22))
    (call $refused (call $path_unlink_file (local.get $ipfs) (local.get $path) (local.get $size)))
    (call $print (i32.const 320) (i32.const 33))
    (i32.store8 (i32.add (local.get $path) (i32.sub (local.get $size) (i32.const 1))) (i32.const 0x7e)) ;; its name, ending in "~"
    (call $refused (call $path_create_directory (local.get $ipfs) (local.get $path) (local.get $size)))))
