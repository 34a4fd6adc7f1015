"""dag-pb and UnixFS for Google's protobuf (upb): the schemas of their specifications, built at run time."""

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_BYTES, _UINT64, _INT64, _UINT32, _FIXED32, _STRING, _ENUM, _MESSAGE = 12, 4, 3, 13, 7, 9, 14, 11
_OPTIONAL, _REQUIRED, _REPEATED = 1, 2, 3


def _message(name: str, *fields: tuple[str, int, int, int, str]) -> descriptor_pb2.DescriptorProto:
    made = [
        descriptor_pb2.FieldDescriptorProto(
            name=label, number=number, label=rule, type=kind, type_name=of or None
        )  # type: ignore[arg-type]  # ints are enums
        for label, number, rule, kind, of in fields
    ]
    return descriptor_pb2.DescriptorProto(name=name, field=made)


def _pool() -> descriptor_pool.DescriptorPool:
    link = _message(
        "PBLink",
        ("Hash", 1, _OPTIONAL, _BYTES, ""),
        ("Name", 2, _OPTIONAL, _BYTES, ""),
        ("Tsize", 3, _OPTIONAL, _UINT64, ""),
    )
    node = _message(
        "PBNode", ("Links", 2, _REPEATED, _MESSAGE, ".dag.PBLink"), ("Data", 1, _OPTIONAL, _BYTES, "")
    )
    stamp = _message(
        "IPFSTimestamp", ("seconds", 1, _REQUIRED, _INT64, ""), ("nanos", 2, _OPTIONAL, _FIXED32, "")
    )
    data = _message(
        "Data",
        ("Type", 1, _REQUIRED, _ENUM, ".dag.DataType"),
        ("Data", 2, _OPTIONAL, _BYTES, ""),
        ("filesize", 3, _OPTIONAL, _UINT64, ""),
        ("blocksizes", 4, _REPEATED, _UINT64, ""),
        ("hashType", 5, _OPTIONAL, _UINT64, ""),
        ("fanout", 6, _OPTIONAL, _UINT64, ""),
        ("mode", 7, _OPTIONAL, _UINT32, ""),
        ("mtime", 8, _OPTIONAL, _MESSAGE, ".dag.IPFSTimestamp"),
    )
    names = ("Raw", "Directory", "File", "Metadata", "Symlink", "HAMTShard")
    values = [
        descriptor_pb2.EnumValueDescriptorProto(name=name, number=number) for number, name in enumerate(names)
    ]
    kinds = descriptor_pb2.EnumDescriptorProto(name="DataType", value=values)
    file = descriptor_pb2.FileDescriptorProto(
        name="dag.proto",
        package="dag",
        syntax="proto2",
        message_type=[link, node, stamp, data],
        enum_type=[kinds],
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


_POOL = _pool()


def message_class(name: str) -> type[message.Message]:
    """The class of `PBNode` or `Data`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"dag.{name}"))
