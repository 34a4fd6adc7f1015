"""The multibase `base256emoji` (https://github.com/multiformats/multibase/blob/master/rfcs/Base256Emoji.md):
each byte is an emoji.

It is here because the multiformats package lists it but can't decode it. Pure functions.
"""

PREFIX = "🚀"
_ALPHABET = (
    "🚀🪐☄🛰🌌🌑🌒🌓🌔🌕🌖🌗🌘🌍🌏🌎🐉☀💻🖥💾💿😂❤😍🤣😊🙏💕😭😘👍"
    "😅👏😁🔥🥰💔💖💙😢🤔😆🙄💪😉☺👌🤗💜😔😎😇🌹🤦🎉💞✌✨🤷😱😌🌸🙌"
    "😋💗💚😏💛🙂💓🤩😄😀🖤😃💯🙈👇🎶😒🤭❣😜💋👀😪😑💥🙋😞😩😡🤪👊🥳"
    "😥🤤👉💃😳✋😚😝😴🌟😬🙃🍀🌷😻😓⭐✅🥺🌈😈🤘💦✔😣🏃💐☹🎊💘😠☝"
    "😕🌺🎂🌻😐🖕💝🙊😹🗣💫💀👑🎵🤞😛🔴😤🌼😫⚽🤙☕🏆🤫👈😮🙆🍻🍃🐶💁"
    "😲🌿🧡🎁⚡🌞🎈❌✊👋😰🤨😶🤝🚶💰🍓💢🤟🙁🚨💨🤬✈🎀🍺🤓😙💟🌱😖👶"
    "🥴▶➡❓💎💸⬇😨🌚🦋😷🕺⚠🙅😟😵👎🤲🤠🤧📌🔵💅🧐🐾🍒😗🤑🌊🤯🐷☎"
    "💧😯💆👆🎤🙇🍑❄🌴💣🐸💌📍🥀🤢👅💡💩👐📸👻🤐🤮🎼🥵🚩🍎🍊👼💍📣🥂"
)
_BYTES = {char: byte for byte, char in enumerate(_ALPHABET)}


def encode(data: bytes) -> str:
    """`data` with the multibase's prefix."""
    return PREFIX + "".join(_ALPHABET[byte] for byte in data)


def decode(text: str) -> bytes:
    """The bytes of `text`, prefix included. Raises ValueError, as the decoders of multiformats do."""
    if not text.startswith(PREFIX):
        raise ValueError("not base256emoji: wrong prefix")
    try:
        return bytes(_BYTES[char] for char in text[1:])
    except KeyError as exc:
        raise ValueError(f"{exc.args[0]!r} is not in base256emoji") from exc
