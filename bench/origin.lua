-- The read half of Azure's Blob REST API, as far as real clients need it, in front of nginx's static files.
--
-- Source of the protocol facts: Microsoft's REST reference (List Blobs, Get Blob, Get Blob Properties, "Specifying
-- conditional headers", "Status and error codes"), and what the clients named in README.md ask for.
-- Containers are the folders of the data directory, and `listing-N`, N names made up on the spot.

local M = {}
local counters = ngx.shared.counters
local concat, format, floor = table.concat, string.format, math.floor

local PAGE = 5000 -- the service's own limit for one page
local PER_FOLDER = 1000 -- files in each folder of a made-up container
local EPOCH = 1700000000 -- modification time of made-up blobs
local BOM = "\239\187\191" -- the service begins its XML with one

local account, service_url, delay_s
local containers = {} -- name -> {count, name(i), entry(i), blobs}

local function escape(text)
    return (text:gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end

-- One <Blob> in two halves around its name, size, ETag and MD5; every property the service sends is there.
local function template(modified)
    local stamp = ngx.http_time(modified)
    return {
        "<Blob><Name>",
        "</Name><Properties><Creation-Time>" .. stamp .. "</Creation-Time><Last-Modified>" .. stamp
            .. "</Last-Modified><Etag>",
        "</Etag><Content-Length>",
        "</Content-Length><Content-Type>application/octet-stream</Content-Type><Content-Encoding />"
            .. "<Content-Language /><Content-CRC64 /><Content-MD5>",
        "</Content-MD5><Cache-Control /><Content-Disposition /><BlobType>BlockBlob</BlobType>"
            .. "<AccessTier>Hot</AccessTier><AccessTierInferred>true</AccessTierInferred>"
            .. "<LeaseStatus>unlocked</LeaseStatus><LeaseState>available</LeaseState>"
            .. "<ServerEncrypted>true</ServerEncrypted></Properties><OrMetadata /></Blob>",
    }
end

local function entry(parts, name, etag, size, md5)
    return concat { parts[1], name, parts[2], etag, parts[3], size, parts[4], md5, parts[5] }
end

-- A container of N blobs that exist only in its list: `part-00000/sample-00000000.bin` and on, sorted by number.
local function made_up(count)
    local parts = template(EPOCH)
    local function name(i)
        return format("part-%05d/sample-%08d.bin", floor((i - 1) / PER_FOLDER), i - 1)
    end
    return {
        count = count,
        blobs = {},
        name = name,
        entry = function(i)
            return entry(parts, name(i), format("0x8DC%012X", i), 100000 + i % 7919, format("%021dA==", i))
        end,
    }
end

-- A container of real files. Index lines: container, name, size, mtime, ETag, MD5 (tabs between, sorted by name).
local function real()
    local names, entries, blobs = {}, {}, {}
    return {
        count = 0,
        names = names,
        blobs = blobs,
        name = function(i) return names[i] end,
        entry = function(i)
            local blob = blobs[names[i]]
            entries[i] = entries[i]
                or entry(template(blob.modified), escape(names[i]), blob.etag, blob.size, blob.md5)
            return entries[i]
        end,
    }
end

function M.init(config)
    account, service_url, delay_s = config.account, config.url, config.delay_s
    for line in io.lines(config.index) do
        local container, name, size, modified, etag, md5 =
            line:match("^([^\t]*)\t([^\t]*)\t(%d+)\t(%d+)\t([^\t]*)\t([^\t]*)$")
        local known = containers[container] or real()
        containers[container] = known
        known.count = known.count + 1
        known.names[known.count] = name
        known.blobs[name] = { size = tonumber(size), modified = tonumber(modified), etag = etag, md5 = md5,
                              quoted = '"' .. etag .. '"', stamp = ngx.http_time(tonumber(modified)) }
    end
end

local function find_container(name)
    if not containers[name] then
        local count = name:match("^listing%-(%d+)$")
        containers[name] = count and made_up(tonumber(count)) or nil
    end
    return containers[name]
end

-- What every answer carries.
local function begin(kind)
    ngx.ctx.kind = kind
    local id, headers, sent = ngx.var.request_id, ngx.header, ngx.req.get_headers()
    headers["Server"] = "Windows-Azure-Blob/1.0"
    headers["x-ms-request-id"] =
        concat({ id:sub(1, 8), id:sub(9, 12), id:sub(13, 16), id:sub(17, 20), id:sub(21) }, "-")
    headers["x-ms-version"] = sent["x-ms-version"] or "2021-12-02"
    headers["x-ms-client-request-id"] = sent["x-ms-client-request-id"]
    if delay_s > 0 then
        ngx.sleep(delay_s)
    end
    return sent
end

local function answer(status, body, content_type)
    ngx.status = status
    ngx.header["Content-Type"] = content_type or "application/xml"
    ngx.header["Content-Length"] = #body
    if ngx.req.get_method() ~= "HEAD" then
        ngx.print(body)
    end
    return ngx.exit(ngx.HTTP_OK)
end

local function fail(status, code, message)
    ngx.header["x-ms-error-code"] = code
    return answer(status, concat { BOM, '<?xml version="1.0" encoding="utf-8"?><Error><Code>', code,
        "</Code><Message>", message, "\nRequestId:", ngx.header["x-ms-request-id"], "\nTime:",
        os.date("!%Y-%m-%dT%H:%M:%S.0000000Z"), "</Message></Error>" })
end

-- The first index in [1, count + 1] for which `is_past(name)` holds; names are sorted by bytes.
local function search(container, is_past)
    local low, high = 1, container.count + 1
    while low < high do
        local middle = floor((low + high) / 2)
        if is_past(container.name(middle)) then high = middle else low = middle + 1 end
    end
    return low
end

local function after_prefix(container, prefix)
    local length = #prefix
    return search(container, function(name) return name:sub(1, length) > prefix end)
end

local function list_blobs(container_name, container, args)
    local limit = math.min(tonumber(args.maxresults) or PAGE, PAGE)
    local prefix, marker = args.prefix or "", args.marker or ""
    local delimiter = args.delimiter ~= "" and args.delimiter or nil
    if prefix == true then prefix = "" end
    if marker == true then marker = "" end
    local first = type(args.startFrom) == "string" and args.startFrom > prefix and args.startFrom or prefix
    local i = tonumber(marker:match("^2!(%d+)$")) or search(container, function(name) return name >= first end)
    local stop = after_prefix(container, prefix)
    local out, n = {
        BOM, '<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="', service_url,
        '" ContainerName="', container_name, '"><Prefix>', escape(prefix), "</Prefix><Marker>", marker,
        "</Marker><MaxResults>", limit, "</MaxResults>",
    }, 0
    if delimiter then
        out[#out + 1] = "<Delimiter>" .. escape(delimiter) .. "</Delimiter>"
    end
    out[#out + 1] = "<Blobs>"
    local used = #out
    while i < stop and n < limit do
        local group
        if delimiter then
            local name = container.name(i)
            local _, at = name:find(delimiter, #prefix + 1, true)
            group = at and name:sub(1, at)
        end
        n = n + 1
        if group then
            out[used + n] = "<BlobPrefix><Name>" .. escape(group) .. "</Name></BlobPrefix>"
            i = after_prefix(container, group)
        else
            out[used + n] = container.entry(i)
            i = i + 1
        end
    end
    local next_marker = i < stop and "<NextMarker>2!" .. i .. "</NextMarker>" or "<NextMarker />"
    out[used + n + 1] = "</Blobs>" .. next_marker .. "</EnumerationResults>"
    return answer(200, concat(out))
end

local function about_container(name, args)
    local container = find_container(name)
    if args.comp == "list" then
        begin("list")
        if not container then return fail(404, "ContainerNotFound", "The specified container does not exist.") end
        return list_blobs(name, container, args)
    end
    begin("other")
    if not container then return fail(404, "ContainerNotFound", "The specified container does not exist.") end
    ngx.header["ETag"], ngx.header["Last-Modified"] = '"0x8DC000000000000"', ngx.http_time(EPOCH)
    return answer(200, "")
end

-- Requests for the account itself, and for anything that isn't there.
function M.account()
    begin("other")
    if ngx.req.get_uri_args().comp ~= "list" then
        return fail(400, "InvalidUri", "The requested URI does not represent any resource on the server.")
    end
    local out = {}
    for name in pairs(containers) do
        out[#out + 1] = "<Container><Name>" .. name .. "</Name><Properties><Last-Modified>" .. ngx.http_time(EPOCH)
            .. '</Last-Modified><Etag>"0x8DC000000000000"</Etag></Properties></Container>'
    end
    return answer(200, BOM .. '<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="'
        .. service_url .. '"><Containers>' .. concat(out) .. "</Containers><NextMarker /></EnumerationResults>")
end

-- GET and HEAD of one blob. Returning lets nginx serve the file: range, length and bytes are its work.
function M.blob()
    local container_name, name = ngx.var.uri:match("^/[^/]+/([^/]+)/?(.*)$")
    if not container_name then return M.account() end
    local args = ngx.var.args and ngx.req.get_uri_args() or {}
    if name == "" then return about_container(container_name, args) end
    local method = ngx.req.get_method()
    local sent = begin(method == "HEAD" and "head" or "get")
    if method ~= "GET" and method ~= "HEAD" then
        return fail(405, "UnsupportedHttpVerb", "The resource doesn't support specified Http Verb.")
    end
    local container = find_container(container_name)
    if not container then return fail(404, "ContainerNotFound", "The specified container does not exist.") end
    local blob = container.blobs[name]
    if not blob then return fail(404, "BlobNotFound", "The specified blob does not exist.") end

    local wanted = sent["if-match"]
    if wanted and wanted ~= "*" then
        if wanted:sub(1, 1) ~= '"' then
            counters:incr("unquoted_if_match", 1, 0)
            wanted = '"' .. wanted .. '"'
        end
        if wanted ~= blob.quoted then
            return fail(412, "ConditionNotMet",
                "The condition specified using HTTP conditional header(s) is not met.")
        end
        ngx.req.clear_header("If-Match") -- judged; nginx would compare its own way
    end

    local headers = ngx.header
    local range = sent["x-ms-range"] or sent["range"]
    if range then
        local first = tonumber(range:match("^bytes=(%d+)%-"))
        if first and first >= blob.size then
            headers["Content-Range"] = "bytes */" .. blob.size
            return fail(416, "InvalidRange",
                "The range specified is invalid for the current size of the resource.")
        end
        ngx.req.set_header("Range", range)
        headers["x-ms-blob-content-md5"] = blob.md5
    else
        headers["Content-MD5"] = blob.md5
    end
    headers["ETag"], headers["Last-Modified"], headers["x-ms-creation-time"] = blob.quoted, blob.stamp, blob.stamp
    headers["x-ms-blob-type"] = "BlockBlob"
    headers["x-ms-lease-status"], headers["x-ms-lease-state"] = "unlocked", "available"
    headers["x-ms-server-encrypted"] = "true"
    if method == "HEAD" then
        headers["x-ms-access-tier"], headers["x-ms-access-tier-inferred"] = "Hot", "true"
    end
end

-- After the last byte of each request.
function M.count()
    local kind = ngx.ctx.kind or "other"
    counters:incr("requests", 1, 0)
    counters:incr(kind, 1, 0)
    counters:incr("bytes", tonumber(ngx.var.body_bytes_sent) or 0, 0)
    if kind == "get" then counters:incr("get_bytes", tonumber(ngx.var.body_bytes_sent) or 0, 0) end
    if ngx.status >= 400 then counters:incr("errors", 1, 0) end
end

function M.stats()
    local out = {}
    for _, key in ipairs { "requests", "get", "head", "list", "other", "errors", "bytes", "get_bytes",
                           "unquoted_if_match" } do
        out[#out + 1] = format('"%s": %.0f', key, counters:get(key) or 0)
    end
    ngx.header["Content-Type"] = "application/json"
    ngx.print("{" .. concat(out, ", ") .. "}")
end

function M.reset()
    counters:flush_all()
    ngx.print("{}")
end

return M
