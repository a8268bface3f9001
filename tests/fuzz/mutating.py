"""What mutations of all formats are made of: numbers, bytes, trees of JSON, messages of protobuf."""

import copy
import math

LARGEST = 2**18  # bytes of a message to which more is added
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 3.4e38, -3.4e38, 1e300, math.inf, -math.inf, math.nan)


def whole(rng, bits=64, signed=False):
    """A whole number that something is likely not to expect."""
    if rng.random() < 0.4:
        value = rng.randrange(10)
    else:
        value = rng.choice([(1 << rng.randrange(bits)) + rng.randrange(-1, 2), -1, rng.randrange(1 << bits)])
    if signed and rng.random() < 0.3:
        value = -value
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> bits - 1 else value


def spoiled(rng, content, spots=(), keep_length=False):
    """Bytes of which a few are changed, copied, left out, repeated or cut off; half of it happens at `spots`."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        if not data:
            break
        at = rng.choice(spots) if spots and rng.random() < 0.5 else rng.randrange(len(data))
        at = min(at, len(data) - 1)
        how = rng.random()
        if how < 0.3:
            data[at] = rng.choice([0, 1, 2, 4, 8, 16, 127, 128, 254, 255, rng.randrange(256)])
        elif how < 0.45:
            data[at] ^= 1 << rng.randrange(8)
        elif how < 0.7:
            width = min(rng.choice([2, 4, 8]), len(data) - at)
            value = rng.choice([whole(rng, 8 * width), rng.randrange(len(data)) % (1 << 8 * width)])
            data[at:at + width] = value.to_bytes(width, rng.choice(["little", "big"]))
        elif how < 0.85:
            source, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 16, 40, 200])
            piece = data[source:source + length]
            data[at:at + len(piece)] = piece
            del data[len(content) if keep_length else len(data):]
        elif not keep_length and how < 0.95:
            length = rng.choice([1, 1, 2, 4, 8, 30])
            if rng.random() < 0.5:
                del data[at:at + length]
            else:
                data[at:at] = data[at:at + length] * rng.choice([1, 1, 2, 50])
        elif how > 0.97:
            del data[rng.randrange(len(data)):]
    return bytes(data)


# ---- Trees, as JSON has them -----------------------------------------------------------------------------------------


def places(tree):
    """(container, key) of everything in a tree."""
    found, waiting = [], [tree]
    while waiting:
        container = waiting.pop()
        for key in (list(container) if isinstance(container, dict) else range(len(container))):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def spoil_tree(rng, tree, words):
    """Change a tree in a few places; `words` are what texts may become."""
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        found = places(tree)
        if not found:
            return
        container, key = rng.choice(found)
        value, how = container[key], rng.random()
        if how < 0.12:
            del container[key]
        elif how < 0.35:
            like = [(c, k) for c, k in found if k == key and c is not container] or found
            other, at = rng.choice(like)
            container[key] = copy.deepcopy(other[at])
        elif how < 0.45 and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(value))
        elif how < 0.5 and isinstance(container, list):
            rng.shuffle(container)
        elif how < 0.53 and isinstance(value, (dict, list)):
            container[key] = [value] if rng.random() < 0.5 else {"config": value}
        elif isinstance(value, str) and how < 0.9:
            container[key] = rng.choice(words)
        elif isinstance(value, bool) and how < 0.9:
            container[key] = not value
        elif isinstance(value, int) and how < 0.9:
            container[key] = whole(rng, rng.choice([8, 16, 32, 64, 2000]), signed=True)
        elif isinstance(value, float) and how < 0.9:
            container[key] = rng.choice(FLOATS)
        else:
            container[key] = rng.choice([None, True, False, 0, -1, 1, 2.5, math.nan, "", rng.choice(words), [], {}, [1],
                                         [2, 2], [-1, 1], [0, 0, 0], 10**400, ["a"] * 9, {"a": None}])


def smaller_trees(tree):
    for i in range(len(places(tree))):
        smaller = copy.deepcopy(tree)
        container, key = places(smaller)[i]
        del container[key]
        yield smaller


# ---- Messages of protobuf --------------------------------------------------------------------------------------------


def messages(root):
    """All messages in a message, itself first."""
    found, waiting = [], [root]
    while waiting:
        message = waiting.pop()
        found.append(message)
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend(value if field.is_repeated else [value])
    return found


def spoil_message(rng, root, words):
    """Change a message in a few places; `words` are what texts may become, beside those that are there."""
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        if root.ByteSize() > LARGEST:
            return
        found = messages(root)
        texts = [value for message in found for field, value in message.ListFields()
                 if field.type == field.TYPE_STRING and not field.is_repeated]
        texts += [text for message in found for field, value in message.ListFields()
                  if field.type == field.TYPE_STRING and field.is_repeated for text in value]
        message = rng.choice(found)
        fields = [field for field, _ in message.ListFields()]
        if not fields or rng.random() < 0.15:
            fields = message.DESCRIPTOR.fields
        if fields:
            _spoil_field(rng, message, rng.choice(fields), found, [*texts, *words])


def _spoil_field(rng, message, field, found, words):
    values, how = getattr(message, field.name), rng.random()
    if not field.is_repeated:
        if how < 0.15:
            message.ClearField(field.name)
        elif field.message_type is None:
            setattr(message, field.name, _value(rng, field, words, values))
        elif like := [one for one in found if one.DESCRIPTOR is field.message_type and one is not values]:
            values.CopyFrom(copy.deepcopy(rng.choice(like)))
        return
    at = rng.randrange(len(values)) if values else 0
    if how < 0.2 and values:
        del values[at]
    elif how < 0.3 and values:
        other = list(values)
        rng.shuffle(other)
        del values[:]
        values.extend(other)
    elif how < 0.35:
        del values[at:]
    elif field.message_type is not None:
        like = [one for one in found if one.DESCRIPTOR is field.message_type and one is not message]
        new = copy.deepcopy(rng.choice(like)) if like else None
        if new is not None and how < 0.6 and values:
            values[at].CopyFrom(new)
        elif new is None:
            values.add()
        else:
            for _ in range(rng.choice([1, 1, 1, 2, 30])):
                values.append(new)
    elif values and how < 0.8:
        values[at] = _value(rng, field, words, values[at])
    else:
        for _ in range(rng.choice([1, 1, 2, 5, 100])):
            values.append(_value(rng, field, words, b""))


def _value(rng, field, words, old):
    kind = field.type
    if kind == field.TYPE_STRING:
        return rng.choice(words)
    if kind == field.TYPE_BYTES:
        return spoiled(rng, old) if old else bytes(rng.randrange(20))
    if kind == field.TYPE_BOOL:
        return rng.random() < 0.5
    if kind in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if kind == field.TYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    is_signed = kind not in (field.TYPE_UINT32, field.TYPE_UINT64)
    return whole(rng, 64 if kind in (field.TYPE_INT64, field.TYPE_UINT64) else 32, is_signed)


def smaller_messages(root):
    """The message without each of its parts, larger parts first."""
    for i in range(len(messages(root))):
        for name in [field.name for field, _ in messages(root)[i].ListFields()]:
            value = getattr(messages(root)[i], name)
            is_list = hasattr(value, "extend")
            for at in range(len(value)) if is_list else [None]:
                smaller = copy.deepcopy(root)
                message = messages(smaller)[i]
                if at is None:
                    message.ClearField(name)
                else:
                    del getattr(message, name)[at]
                yield smaller
