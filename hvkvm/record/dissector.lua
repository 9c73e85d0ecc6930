-- What Wireshark shows of a recording that `hvkvm run --record` made. The tables above come from
-- the layouts that hvkvm itself uses.

local proto = Proto("hvkvm", "Hyper-V VMBus (hvkvm recording)")
local fields = {}
local all = {}

local function add(name, field)
  fields[name] = field
  all[#all + 1] = field
end

local KINDS = {[0] = "Machine", "Message", "Packet", "Signal", "Channel", "Hypercall", "Lost", "Pointed"}
local EVENTS = {[0] = "opened", "closed", "failed"}
add("kind", ProtoField.uint8("hvkvm.kind", "Kind", base.DEC, KINDS))
add("to_host", ProtoField.bool("hvkvm.to_host", "To host"))
add("cut", ProtoField.bool("hvkvm.cut", "Cut"))
add("vp", ProtoField.uint16("hvkvm.vp", "VP", base.DEC))
add("sint", ProtoField.uint16("hvkvm.sint", "SINT", base.DEC))
add("relid", ProtoField.uint32("hvkvm.relid", "Channel", base.DEC))
add("value", ProtoField.uint32("hvkvm.value", "Value", base.HEX))
add("interface", ProtoField.bytes("hvkvm.interface", "Interface type"))
add("protocol", ProtoField.string("hvkvm.protocol", "Device protocol"))
add("text", ProtoField.string("hvkvm.text", "Text"))
add("control", ProtoField.uint64("hvkvm.hypercall.control", "Control", base.HEX))
add("input", ProtoField.uint64("hvkvm.hypercall.input", "Input", base.HEX))
add("header", ProtoField.bytes("hvkvm.packet.header", "Packet header"))
add("rest", ProtoField.bytes("hvkvm.data", "Data"))

local short = ProtoExpert.new("hvkvm.short", "Fields are missing", expert.group.MALFORMED, expert.severity.ERROR)
proto.experts = {short}

for number, layout in ipairs(LAYOUTS) do
  for position, field in ipairs(layout.fields) do
    local key = number .. "." .. position
    local filter = layout.filter .. "." .. field.name
    if field.kind == "bytes" then
      add(key, ProtoField.bytes(filter, field.name))
    else
      local make = ProtoField[field.kind]
      if field.names then
        add(key, make(filter, field.name, field.signed and base.DEC or base.HEX, field.names))
      else
        add(key, make(filter, field.name, base.DEC))
      end
    end
  end
end
proto.fields = all

-- A field's value as `hvkvm explain` shows it.
local function shown(field, value)
  local name = field.names and field.names[value]
  if name then return name end
  if value > -10 and value < 10 then return tostring(value) end
  return string.format("0x%x", value)
end

-- The fields of `first` and what it leads to; where they end, and words for the column.
local function decode(range, first, tree)
  local known, said = {}, {}
  local at, number, repeats = 0, first, 0
  while number do
    local layout = LAYOUTS[number]
    if at + layout.size > range:len() then
      if not (layout.optional or (layout.repeats and at == range:len())) then
        tree:add_proto_expert_info(short)
        said[#said + 1] = "(" .. layout.name .. " is cut short)"
      end
      return at, said
    end
    local branch = tree
    if #layout.fields > 0 then branch = tree:add(proto, range(at, layout.size), layout.name) end
    for position, field in ipairs(layout.fields) do
      local part = range(at + field.offset, field.size)
      local key = number .. "." .. position
      if field.kind == "bytes" then
        branch:add(fields[key], part)
      else
        branch:add_le(fields[key], part)
        if field.size <= 4 then
          local value = field.signed and part:le_int() or part:le_uint()
          known[field.name] = value
          if #said == 0 or ((value ~= 0 or field.names and field.names[0]) and #said < 16) then
            said[#said + 1] = field.name .. "=" .. shown(field, value)
          end
        end
      end
    end
    at = at + layout.size
    if layout.repeats then
      repeats = repeats + 1
      if at >= range:len() or repeats >= MAX_REPEATS or layout.size == 0 then return at, said end
    elseif layout.switch then
      number = layout.cases[known[layout.switch]]
    else
      number = layout.next
    end
  end
  return at, said
end

local function message(range, tree)
  if range:len() < 8 then
    tree:add_proto_expert_info(short)
    return {"no message"}
  end
  local number = MESSAGES[range(0, 4):le_uint()]
  if not number then return {"no message of the table"} end
  if range:len() == 8 then -- Wireshark has no empty range
    if LAYOUTS[number].size > 0 then tree:add_proto_expert_info(short) end
    return {LAYOUTS[number].name}
  end
  local at, said = decode(range(8), number, tree)
  if at + 8 < range:len() then tree:add(fields.rest, range(8 + at)) end
  table.insert(said, 1, LAYOUTS[number].name)
  return said
end

local function packet(range, protocol, cut, tree)
  local _, said = decode(range, DESCRIPTOR, tree)
  if range:len() < 16 then return said end
  local offset = range(2, 2):le_uint() * 8
  said = {PACKET_TYPES[range(0, 2):le_uint()] or "packet"}
  if offset > range:len() then
    if not cut then tree:add_proto_expert_info(short) end
    return said
  end
  if offset > 16 then tree:add(fields.header, range(16, offset - 16)) end
  local size = range:len() - offset
  if size <= 0 then return said end
  local payload = range(offset)
  local at = 0
  if protocol and protocol.payload then
    local words
    at, words = decode(payload, protocol.payload, tree)
    for _, word in ipairs(words) do said[#said + 1] = word end
  end
  if at < size then tree:add(fields.rest, payload(at)) end
  return said
end

local function protocol_of(guid)
  if PROTOCOLS[guid] then return PROTOCOLS[guid] end
  if guid:sub(9) == HVSOCK_TAIL then return HVSOCK end
  return nil
end

function proto.dissector(buffer, info, tree)
  if buffer:len() < 32 then return 0 end
  info.cols.protocol = "VMBus"
  local kind, to_host = buffer(1, 1):uint(), buffer(2, 1):uint() ~= 0
  local cut = buffer(3, 1):uint() % 2 == 1
  local guid = buffer(16, 16):bytes():tohex():lower()
  local protocol = protocol_of(guid)
  local root = tree:add(proto, buffer())
  root:add(fields.kind, buffer(1, 1))
  root:add(fields.to_host, buffer(2, 1))
  root:add(fields.cut, buffer(3, 1), cut)
  root:add_le(fields.vp, buffer(4, 2))
  root:add_le(fields.sint, buffer(6, 2))
  root:add_le(fields.relid, buffer(8, 4))
  root:add_le(fields.value, buffer(12, 4))
  root:add(fields.interface, buffer(16, 16))
  if protocol then root:add(fields.protocol, protocol.name) end
  info.cols.src = to_host and "guest" or "host"
  info.cols.dst = to_host and "host" or "guest"
  local said = {KINDS[kind] or "?"}
  local size = buffer:len() - 32
  if kind == 1 then
    said = size > 0 and message(buffer(32), root) or {"no message"}
  elseif kind == 2 then
    said = size > 0 and packet(buffer(32), protocol, cut, root) or {"no packet"}
    table.insert(said, 1, (protocol and protocol.name or "data") .. ":")
  elseif kind == 4 then
    said = {"channel " .. (EVENTS[buffer(12, 4):le_uint()] or "?")}
    if size > 0 then
      root:add(fields.text, buffer(32))
      said[2] = buffer(32):string()
    end
  elseif kind == 5 and size >= 16 then
    root:add_le(fields.control, buffer(32, 8))
    root:add_le(fields.input, buffer(40, 8))
  elseif kind == 7 and size > 0 then
    said = {(protocol and protocol.name or "data") .. ":"}
    local at = 0
    if protocol and protocol.pointed then
      local words
      at, words = decode(buffer(32), protocol.pointed, root)
      for _, word in ipairs(words) do said[#said + 1] = word end
    end
    if at < size then root:add(fields.rest, buffer(32 + at)) end
  elseif kind == 0 and size > 0 then
    root:add(fields.text, buffer(32))
  end
  info.cols.info = table.concat(said, " ")
  return buffer:len()
end

DissectorTable.get("wtap_encap"):add(wtap.USER0, proto)
