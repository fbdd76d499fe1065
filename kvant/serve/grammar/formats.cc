#include "kvant/serve/grammar/formats.h"

#include <utility>

namespace kvant::serve::grammar {
namespace {

// RFC 3339. 29 February, which only leap years have, is left out.
#define KVANT_DATE \
  "[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
#define KVANT_TIME \
  "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
#define KVANT_HOSTNAME                                                                             \
  "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?){0," \
  "8}"
#define KVANT_BYTE "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
#define KVANT_HEX "[0-9a-fA-F]{1,4}"
#define KVANT_SECONDS "[0-9]{1,9}S"
#define KVANT_MINUTES "([0-9]{1,9}M(" KVANT_SECONDS ")?|" KVANT_SECONDS ")"
#define KVANT_CLOCK "T([0-9]{1,9}H" KVANT_MINUTES "?|" KVANT_MINUTES ")"
#define KVANT_DAYS "[0-9]{1,9}D"
#define KVANT_MONTHS "([0-9]{1,9}M(" KVANT_DAYS ")?|" KVANT_DAYS ")"

constexpr std::pair<std::string_view, std::string_view> kFormats[] = {
    {"date", KVANT_DATE},
    {"time", KVANT_TIME},
    {"date-time", KVANT_DATE "T" KVANT_TIME},
    {"duration", "P([0-9]{1,9}W|([0-9]{1,9}Y" KVANT_MONTHS "?|" KVANT_MONTHS ")(" KVANT_CLOCK
                 ")?|" KVANT_CLOCK ")"},
    {"email", "[a-zA-Z0-9_+-]{1,32}(\\.[a-zA-Z0-9_+-]{1,31})?@" KVANT_HOSTNAME},
    {"hostname", KVANT_HOSTNAME},
    {"ipv4", KVANT_BYTE "(\\." KVANT_BYTE "){3}"},
    {"ipv6",
     "((" KVANT_HEX ":){7}" KVANT_HEX "|(" KVANT_HEX ":){1,7}:|(" KVANT_HEX ":){1,6}:" KVANT_HEX
     "|(" KVANT_HEX ":){1,5}(:" KVANT_HEX "){1,2}|(" KVANT_HEX ":){1,4}(:" KVANT_HEX
     "){1,3}|(" KVANT_HEX ":){1,3}(:" KVANT_HEX "){1,4}|(" KVANT_HEX ":){1,2}(:" KVANT_HEX
     "){1,5}|" KVANT_HEX ":(:" KVANT_HEX "){1,6}|:((:" KVANT_HEX "){1,7}|:))"},
    {"uuid", "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"},
    {"uri",
     "[a-zA-Z][a-zA-Z0-9+.-]{0,30}://([a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})+"
     "(\\?([a-zA-Z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?"
     "(#([a-zA-Z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?"},
};

}  // namespace

std::string_view format_regex(std::string_view format) {
  for (const auto& [name, regex] : kFormats) {
    if (name == format) return regex;
  }
  return {};
}

std::string format_names() {
  std::string out;
  for (const auto& [name, regex] : kFormats) {
    if (!out.empty()) out += ", ";
    out += name;
  }
  return out;
}

}  // namespace kvant::serve::grammar
