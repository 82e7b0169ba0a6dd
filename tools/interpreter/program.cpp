// Reads PTX text.
#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <map>
#include <stdexcept>
#include <unordered_map>

namespace ptx {

int bytes_of(Type type) {
  switch (type) {
    case Type::U8:
    case Type::S8:
      return 1;
    case Type::U16:
    case Type::S16:
    case Type::F16:
    case Type::BF16:
    case Type::E4M3x2:
      return 2;
    case Type::U64:
    case Type::S64:
    case Type::F64:
      return 8;
    default:
      return 4;
  }
}

std::string Module::line(int number) const {
  size_t const begin = line_starts[number - 1], end = text.find('\n', begin);
  std::string found = text.substr(begin, end - begin);
  found.erase(0, found.find_first_not_of(" \t"));
  return found;
}

namespace {

std::unordered_map<std::string_view, Type> const kTypes = {
    {"u8", Type::U8},         {"b8", Type::U8},         {"s8", Type::S8},       {"u16", Type::U16},
    {"b16", Type::U16},       {"s16", Type::S16},       {"u32", Type::U32},     {"b32", Type::U32},
    {"s32", Type::S32},       {"u64", Type::U64},       {"b64", Type::U64},     {"s64", Type::S64},
    {"f16", Type::F16},       {"bf16", Type::BF16},     {"f32", Type::F32},     {"f64", Type::F64},
    {"f16x2", Type::F16x2},   {"bf16x2", Type::BF16x2}, {"u16x2", Type::U16x2}, {"s16x2", Type::S16x2},
    {"e4m3x2", Type::E4M3x2}, {"pred", Type::Pred}};

std::unordered_map<std::string_view, Op> const kOps = {{"abs", Op::Abs},
                                                       {"add", Op::Add},
                                                       {"and", Op::And},
                                                       {"atom", Op::Atom},
                                                       {"red", Op::Atom},
                                                       {"bfe", Op::Bfe},
                                                       {"bfi", Op::Bfi},
                                                       {"bfind", Op::Bfind},
                                                       {"bra", Op::Bra},
                                                       {"brev", Op::Brev},
                                                       {"clz", Op::Clz},
                                                       {"cvt", Op::Cvt},
                                                       {"cvta", Op::Cvta},
                                                       {"div", Op::Div},
                                                       {"elect", Op::Elect},
                                                       {"ex2", Op::Ex2},
                                                       {"exit", Op::Exit},
                                                       {"ret", Op::Exit},
                                                       {"fma", Op::Fma},
                                                       {"ld", Op::Ld},
                                                       {"ldu", Op::Ld},
                                                       {"ldmatrix", Op::Ldmatrix},
                                                       {"lg2", Op::Lg2},
                                                       {"lop3", Op::Lop3},
                                                       {"mad", Op::Mad},
                                                       {"max", Op::Max},
                                                       {"mbarrier", Op::Mbarrier},
                                                       {"min", Op::Min},
                                                       {"mov", Op::Mov},
                                                       {"mul", Op::Mul},
                                                       {"nanosleep", Op::Nanosleep},
                                                       {"neg", Op::Neg},
                                                       {"not", Op::Not},
                                                       {"or", Op::Or},
                                                       {"popc", Op::Popc},
                                                       {"prmt", Op::Prmt},
                                                       {"rcp", Op::Rcp},
                                                       {"redux", Op::Redux},
                                                       {"rem", Op::Rem},
                                                       {"selp", Op::Selp},
                                                       {"setp", Op::Setp},
                                                       {"shf", Op::Shf},
                                                       {"shfl", Op::Shfl},
                                                       {"shl", Op::Shl},
                                                       {"shr", Op::Shr},
                                                       {"sqrt", Op::Sqrt},
                                                       {"st", Op::St},
                                                       {"stmatrix", Op::Stmatrix},
                                                       {"sub", Op::Sub},
                                                       {"trap", Op::Trap},
                                                       {"vote", Op::Vote},
                                                       {"xor", Op::Xor},
                                                       {"prefetch", Op::Nop},
                                                       {"prefetchu", Op::Nop},
                                                       {"membar", Op::Fence},
                                                       {"setmaxnreg", Op::Nop},
                                                       {"griddepcontrol", Op::Nop}};

struct Register {
  Operand::Kind kind;
  int index;
};

struct Scope {
  Scope* parent;
  std::unordered_map<std::string, Register> registers;
  // declared as %r<N>: first index, and the kind, by prefix
  struct Range {
    Operand::Kind kind;
    int first, count;
  };
  std::map<std::string, Range> ranges;
  std::unordered_map<std::string, int> labels;
};

class Parser {
 public:
  explicit Parser(Module& module) : module_(module), text_(module.text) {
    module.line_starts.push_back(0);
    for (size_t i = 0; i < text_.size(); ++i) {
      if (text_[i] == '\n') module.line_starts.push_back(i + 1);
    }
  }

  void run() {
    while (skip_space()) {
      if (starts(".visible") || starts(".entry") || starts(".weak")) {
        size_t const end = text_.find_first_of("(;", at_);
        if (text_.substr(at_, end - at_).find(".entry") == std::string::npos) {
          at_ = text_.find(';', at_) + 1;  // a variable
          continue;
        }
        entry();
      } else if (starts(".version") || starts(".target") || starts(".address_size") || starts(".file") ||
                 starts(".loc")) {
        at_ = text_.find('\n', at_);
        if (at_ == std::string::npos) return;
      } else if (starts(".section")) {
        at_ = text_.find('}', at_) + 1;
      } else if (starts(".global") || starts(".extern") || starts(".const") || starts(".shared")) {
        size_t const end = text_.find(';', at_);
        std::string const words = text_.substr(at_, end - at_);
        if (words.find(".shared") != std::string::npos) {
          size_t const name_end = words.find('['), name_begin = words.find_last_of(" \t", name_end) + 1;
          shared_symbols_[words.substr(name_begin, name_end - name_begin)] = 0;
        }
        at_ = end + 1;
      } else {
        fail("not understood");
      }
    }
  }

 private:
  [[noreturn]] void fail(std::string const& what) const {
    auto const& starts = module_.line_starts;
    int const number = int(std::upper_bound(starts.begin(), starts.end(), at_) - starts.begin());
    throw std::runtime_error("PTX line " + std::to_string(number) + ": " + what + ": " + module_.line(number));
  }
  bool starts(char const* word) const { return text_.compare(at_, std::strlen(word), word) == 0; }

  // Past white space and comments; false at the end.
  bool skip_space() {
    while (at_ < text_.size()) {
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (text_.compare(at_, 2, "/*") == 0) {
        at_ = text_.find("*/", at_) + 2;
      } else {
        return text_[at_] != '\0';
      }
    }
    return false;
  }

  void entry() {
    kernel_ = &module_.kernels.emplace_back();
    size_t const open = text_.find('(', at_);
    size_t const name_end = text_.find_last_not_of(" \t\n", open - 1) + 1;
    size_t const name_begin = text_.find_last_of(" \t\n", name_end - 1) + 1;
    kernel_->name = text_.substr(name_begin, name_end - name_begin);
    size_t const close = text_.find(')', open);
    params_.clear();
    parameters(text_.substr(open + 1, close - open - 1));
    at_ = text_.find('{', close) + 1;
    scopes_.clear();
    fixups_.clear();
    scope_ = scopes_.emplace_back(std::make_unique<Scope>()).get();
    scope_->parent = nullptr;
    specials_.clear();
    while (scope_) {
      if (!skip_space()) fail("end of text in a kernel");
      statement();
    }
    for (auto const& fix : fixups_) {
      int target = -1;
      for (Scope* s = fix.scope; s && target < 0; s = s->parent) {
        auto const found = s->labels.find(fix.label);
        if (found != s->labels.end()) target = found->second;
      }
      if (target < 0) throw std::runtime_error("no label " + fix.label);
      kernel_->code[fix.instruction].args.back().value = target;
    }
    auto& end = kernel_->code.emplace_back();
    end.op = Op::Exit;
  }

  void parameters(std::string const& list) {
    size_t begin = 0;
    while (begin < list.size()) {
      size_t const comma = std::min(list.find(',', begin), list.size());
      std::string const one = list.substr(begin, comma - begin);
      begin = comma + 1;
      if (one.find(".param") == std::string::npos) continue;
      int bytes = 0;
      std::string name = one.substr(one.find_last_of(" \t") + 1);
      while (!name.empty() && std::isspace(static_cast<unsigned char>(name.back()))) name.pop_back();
      if (size_t const bracket = name.find('['); bracket != std::string::npos) {
        bytes = std::stoi(name.substr(bracket + 1));
        name = name.substr(0, bracket);
      } else {
        for (auto const& [word, type] : kTypes) {
          if (one.find("." + std::string(word) + " ") != std::string::npos) bytes = bytes_of(type);
        }
      }
      int const offset = (kernel_->param_bytes + 127) / 128 * 128;
      params_[name] = offset;
      kernel_->params.push_back({bytes, offset});
      kernel_->param_bytes = offset + bytes;
    }
  }

  void statement() {
    char const c = text_[at_];
    if (c == '{') {
      auto scope = std::make_unique<Scope>();
      scope->parent = scope_;
      scope_ = scopes_.emplace_back(std::move(scope)).get();
      ++at_;
    } else if (c == '}') {
      scope_ = scope_->parent;
      ++at_;
    } else if (c == ';') {
      ++at_;
    } else if (starts(".loc") || starts(".file")) {
      at_ = text_.find('\n', at_);
    } else if (starts(".pragma")) {
      at_ = text_.find(';', at_) + 1;
    } else if (starts(".reg")) {
      declare();
    } else if (starts(".shared")) {
      fail("static shared memory");
    } else if (starts(".local")) {
      fail("local memory");
    } else {
      size_t end = at_;
      while (std::isalnum(static_cast<unsigned char>(text_[end])) || std::strchr("_$%", text_[end])) ++end;
      size_t colon = end;
      while (text_[colon] == ' ' || text_[colon] == '\t') ++colon;
      if (text_[colon] == ':') {
        scope_->labels[text_.substr(at_, end - at_)] = int(kernel_->code.size());
        at_ = colon + 1;
      } else {
        instruction();
      }
    }
  }

  void declare() {
    size_t const end = text_.find(';', at_);
    std::string list = text_.substr(at_ + 4, end - at_ - 4);
    size_t const dot = list.find('.');
    size_t type_end = dot + 1;
    while (std::isalnum(static_cast<unsigned char>(list[type_end]))) ++type_end;
    auto const type = kTypes.find(std::string_view(list).substr(dot + 1, type_end - dot - 1));
    if (type == kTypes.end()) fail("register type");
    auto const kind = type->second == Type::Pred    ? Operand::RegPred
                      : bytes_of(type->second) == 8 ? Operand::Reg64
                                                    : Operand::Reg32;
    std::string names = list.substr(type_end);
    size_t begin = 0;
    while (begin < names.size()) {
      size_t const comma = std::min(names.find(',', begin), names.size());
      std::string name = names.substr(begin, comma - begin);
      begin = comma + 1;
      name.erase(std::remove_if(name.begin(), name.end(), [](unsigned char x) { return std::isspace(x); }), name.end());
      if (size_t const open = name.find('<'); open != std::string::npos) {
        int const count = std::stoi(name.substr(open + 1));
        scope_->ranges[name.substr(0, open)] = {kind, allocate(kind, count), count};
      } else if (!name.empty()) {
        scope_->registers[name] = {kind, allocate(kind, 1)};
      }
    }
    at_ = end + 1;
  }

  int allocate(Operand::Kind kind, int count) {
    int& next = kind == Operand::RegPred ? kernel_->num_preds
                : kind == Operand::Reg64 ? kernel_->num_reg64
                                         : kernel_->num_reg32;
    int const first = next;
    next += count;
    return first;
  }

  bool find_register(std::string const& name, Register* found) {
    for (Scope* s = scope_; s; s = s->parent) {
      if (auto const it = s->registers.find(name); it != s->registers.end()) {
        *found = it->second;
        return true;
      }
      size_t digits = name.size();
      while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
      if (digits == name.size() || digits == 0) continue;
      auto const range = s->ranges.find(name.substr(0, digits));
      if (range == s->ranges.end()) continue;
      int const index = std::stoi(name.substr(digits));
      if (index >= range->second.count) continue;
      *found = {range->second.kind, range->second.first + index};
      return true;
    }
    return false;
  }

  void instruction() {
    auto const& starts_of = module_.line_starts;
    Instruction made;
    made.line = int(std::upper_bound(starts_of.begin(), starts_of.end(), at_) - starts_of.begin());
    size_t const end = text_.find(';', at_);
    std::string_view rest(text_.data() + at_, end - at_);
    auto trim = [&] {
      while (!rest.empty() && std::isspace(static_cast<unsigned char>(rest.front()))) rest.remove_prefix(1);
    };
    if (rest.front() == '@') {
      rest.remove_prefix(1);
      if (rest.front() == '!') {
        made.guard_negated = true;
        rest.remove_prefix(1);
      }
      size_t const space = rest.find_first_of(" \t\n");
      Register guard;
      if (!find_register(std::string(rest.substr(0, space)), &guard)) fail("guard");
      made.guard = guard.index;
      rest.remove_prefix(space);
      trim();
    }
    size_t const opcode_end = std::min(rest.find_first_of(" \t\n"), rest.size());
    std::string_view opcode = rest.substr(0, opcode_end);
    rest.remove_prefix(opcode_end);
    while (true) {
      size_t const dot = opcode.find('.');
      made.words.emplace_back(opcode.substr(0, dot));
      if (dot == std::string_view::npos) break;
      opcode.remove_prefix(dot + 1);
    }
    operands(made, rest);
    classify(made);
    at_ = end + 1;
    kernel_->code.push_back(std::move(made));
  }

  void operands(Instruction& made, std::string_view rest) {
    std::string clean;  // no white space, no comments
    for (size_t i = 0; i < rest.size(); ++i) {
      if (!std::isspace(static_cast<unsigned char>(rest[i]))) clean += rest[i];
    }
    size_t at = 0;
    while (at < clean.size()) {
      made.args.push_back(operand(clean, at));
      if (at < clean.size() && (clean[at] == ',' || clean[at] == '|')) {
        ++at;
      } else if (at < clean.size() && clean[at] != '{' && clean[at] != '[') {
        fail("operands");
      }
    }
    if (made.words[0] == "bra") fixups_.push_back({int(kernel_->code.size()), clean, scope_});
  }

  Operand operand(std::string const& s, size_t& at) {
    Operand made;
    if (s[at] == '{' || s[at] == '[') {
      char const close = s[at] == '{' ? '}' : ']';
      made.kind = close == '}' ? Operand::Vector : Operand::Address;
      ++at;
      if (close == ']') {
        std::string const base = word(s, at);
        address(made, base);
        if (s[at] == '+') {
          ++at;
          made.value += std::stoll(word(s, at));
        }
        if (s[at] == ',') {  // a tensor's coordinates
          ++at;
          made.parts.push_back(operand(s, at));
        }
      } else {
        while (s[at] != close) {
          made.parts.push_back(operand(s, at));
          if (s[at] == ',') ++at;
        }
      }
      if (s[at] != close) fail("bracket");
      ++at;
      return made;
    }
    if (s[at] == '!') {
      made.negated = true;
      ++at;
    }
    std::string const name = word(s, at);
    if (name == "_") return made;
    Register found;
    if (find_register(name, &found)) {
      made.kind = found.kind;
      made.reg = found.index;
    } else if (name[0] == '%') {
      special(made, name);
    } else if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') {
      number(made, name);
    } else if (auto const param = params_.find(name); param != params_.end()) {
      made.kind = Operand::Reg64;  // parameters lie where %param points
      special(made, "%param+" + std::to_string(param->second));
    } else if (shared_symbols_.count(name)) {
      immediate(made, 0);
    } else {
      made.kind = Operand::Label;
    }
    return made;
  }

  static std::string word(std::string const& s, size_t& at) {
    size_t const begin = at;
    if (s[at] == '-') ++at;
    while (at < s.size() && !std::strchr(",|{}[]+", s[at])) ++at;
    return s.substr(begin, at - begin);
  }

  void address(Operand& made, std::string const& base) {
    Register found;
    if (find_register(base, &found)) {
      made.reg = found.index;
      made.reg_is_64 = found.kind == Operand::Reg64;
    } else if (auto const param = params_.find(base); param != params_.end()) {
      Operand pointer;
      special(pointer, "%param+" + std::to_string(param->second));
      made.reg = pointer.reg;
      made.reg_is_64 = true;
    } else if (shared_symbols_.count(base)) {
      made.reg = -1;
    } else {
      fail("address");
    }
  }

  void special(Operand& made, std::string const& name) {
    bool const is_64 = name.rfind("%param", 0) == 0 || name == "%globaltimer" || name == "%clock64";
    auto const [it, fresh] = specials_.try_emplace(name, -1);
    if (fresh) {
      it->second = allocate(is_64 ? Operand::Reg64 : Operand::Reg32, 1);
      kernel_->specials.push_back({name, it->second, is_64});
    }
    made.kind = is_64 ? Operand::Reg64 : Operand::Reg32;
    made.reg = it->second;
  }

  static void immediate(Operand& made, uint64_t value) {
    made.kind = Operand::Immediate;
    made.value = value;
    made.lanes32 = std::make_shared<std::array<uint32_t, kLanes>>();
    made.lanes64 = std::make_shared<std::array<uint64_t, kLanes>>();
    made.lanes32->fill(uint32_t(value));
    made.lanes64->fill(value);
  }
  static void number(Operand& made, std::string const& s) {
    if (s.rfind("0f", 0) == 0 || s.rfind("0F", 0) == 0 || s.rfind("0d", 0) == 0 || s.rfind("0D", 0) == 0) {
      immediate(made, std::stoull(s.substr(2), nullptr, 16));
    } else {
      immediate(made, s[0] == '-' ? uint64_t(std::stoll(s, nullptr, 0)) : std::stoull(s, nullptr, 0));
    }
  }

  void classify(Instruction& i) {
    auto const& w = i.words;
    auto is = [&](size_t n, char const* word) { return w.size() > n && w[n] == word; };
    if (w[0] == "bar" || w[0] == "barrier") {
      if (w[0] == "barrier" && is(1, "cluster")) fail("clusters");
      i.op = is(1, "warp") ? Op::BarWarp : Op::Bar;
      i.mode = i.has("arrive") ? 1 : i.has("red") ? 2 : 0;
    } else if (w[0] == "fence") {
      i.op = is(1, "proxy") && is(2, "async") ? Op::FenceProxy : Op::Fence;
    } else if (w[0] == "cp") {
      if (is(2, "bulk")) {
        if (!is(3, "tensor")) fail("bulk copy");
        i.op = Op::CpAsyncBulk;
      } else {
        i.op = is(2, "mbarrier")                          ? Op::CpAsyncArrive
               : is(2, "commit_group")                    ? Op::CpAsyncCommit
               : is(2, "wait_all") || is(2, "wait_group") ? Op::CpAsyncWait
                                                          : Op::CpAsync;
        if (i.op == Op::CpAsyncArrive && !i.has("noinc")) fail("arrive that counts itself in");
      }
    } else if (w[0] == "wgmma") {
      i.op = is(1, "fence")          ? Op::WgmmaFence
             : is(1, "commit_group") ? Op::WgmmaCommit
             : is(1, "wait_group")   ? Op::WgmmaWait
                                     : Op::WgmmaMma;
    } else {
      auto const op = kOps.find(w[0]);
      if (op == kOps.end()) fail("instruction");
      i.op = op->second;
    }
    int types = 0;
    for (size_t n = 1; n < w.size(); ++n) {
      auto const type = kTypes.find(w[n]);
      if (type != kTypes.end() && types < 3) i.types[types++] = type->second;
      if (w[n] == "v2" || w[n] == "x2") i.count = 2;
      if (w[n] == "v4" || w[n] == "x4") i.count = 4;
    }
    if (i.op == Op::WgmmaMma) {
      for (auto const& word : w) {
        if (word.rfind("m64n", 0) == 0) i.count = std::stoi(word.substr(4));
      }
    }
    static std::unordered_map<std::string_view, int> const kModes = {
        {"eq", 0}, {"ne", 1},  {"lt", 2},  {"le", 3},  {"gt", 4},  {"ge", 5},   {"lo", 2},   {"ls", 3},   {"hi", 4},
        {"hs", 5}, {"equ", 6}, {"neu", 7}, {"ltu", 8}, {"leu", 9}, {"gtu", 10}, {"geu", 11}, {"num", 12}, {"nan", 13}};
    if (i.op == Op::Setp) {
      auto const mode = kModes.find(w[1]);
      if (mode == kModes.end()) fail("comparison");
      i.mode = mode->second;
    } else if (i.op == Op::Mul || i.op == Op::Mad) {
      i.mode = i.has("hi") ? 1 : i.has("wide") ? 2 : 0;
    } else if (i.op == Op::Shfl) {
      i.mode = is(2, "up") ? 1 : is(2, "down") ? 2 : is(2, "bfly") ? 3 : 0;
    } else if (i.op == Op::Ld || i.op == Op::St || i.op == Op::Atom) {
      i.mode = i.has("shared") || i.has("shared::cta") ? 1
               : i.has("global")                       ? 2
               : i.has("param")                        ? 3
               : i.has("local")                        ? -1
                                                       : 0;
      if (i.mode < 0) fail("local memory");
    } else if (i.op == Op::Mbarrier) {
      i.mode = is(1, "init")                             ? 0
               : is(1, "arrive")                         ? (i.has("expect_tx") ? 2 : 1)
               : is(1, "try_wait") || is(1, "test_wait") ? 3
               : is(1, "inval")                          ? 4
               : is(1, "expect_tx")                      ? 5
                                                         : -1;
      if (i.mode < 0) fail("mbarrier operation");
      if (i.mode == 3 && !i.has("parity")) fail("wait by token");
    }
  }

  struct Fixup {
    int instruction;
    std::string label;
    Scope* scope;
  };

  Module& module_;
  std::string const& text_;
  size_t at_ = 0;
  Kernel* kernel_ = nullptr;
  Scope* scope_ = nullptr;
  std::vector<std::unique_ptr<Scope>> scopes_;
  std::unordered_map<std::string, int> params_, shared_symbols_, specials_;
  std::vector<Fixup> fixups_;
};

}  // namespace

std::shared_ptr<Module> parse(std::string text) {
  auto module = std::make_shared<Module>();
  module->text = std::move(text);
  Parser(*module).run();
  return module;
}

}  // namespace ptx
